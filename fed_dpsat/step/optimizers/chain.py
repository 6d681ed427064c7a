"""Optimizers over optimizers, by name: ``dp-sat`` over ``disk`` over ``adam``.

``optimizer = "dp-sat"``, ``base_optimizer = "disk+adam"``. Each is built with the next as its ``base``; where the last
one wants a base too, that is ``dp-sgd``.

========================================= ==================================================
case                                      what happens
========================================= ==================================================
an optimizer that takes no base           ``PluginError`` unless it is the last
one of them twice                         ``PluginError``
an argument that none of them takes       ``PluginError`` with near ones
an argument that is a setting             ``PluginError``: one value has one place
an argument that two of them take         both get it
one around a base of another space        ``SettingError`` in the trial of a run: dp-sat has nothing to climb
                                          over zeroth-order
========================================= ==================================================
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fed_dpsat import plugins
from fed_dpsat.plugins import Factory, PluginError
from fed_dpsat.step.optimizers.base import PrivateOptimizer

PLAIN = "dp-sgd"
"""The default of ``base_optimizer``, and the base of the last of a chain."""


def split_chain(base_optimizer: str) -> list[str]:
    """``"disk+adam"`` as its names."""
    return [name.strip() for name in base_optimizer.split("+")]


def described(optimizer: str, base_optimizer: str) -> str:
    """``"dp-sat over disk over adam"``; a base that is plain DP-SGD goes without saying."""
    return " over ".join([optimizer, *(name for name in split_chain(base_optimizer) if name != PLAIN)])


def build_optimizer(
    optimizer: str, base_optimizer: str, settings: Mapping[str, Any], arguments: str = ""
) -> PrivateOptimizer:
    """``optimizer`` over those that ``base_optimizer`` names, with ``settings`` and, of ``arguments``, what each takes.

    Raises ``PluginError`` for a chain that makes no sense (see the table above), or what a factory raises.
    """
    links = _links(optimizer, base_optimizer)
    given = _given(links, settings, arguments)
    base: PrivateOptimizer | None = None
    for link in reversed(links):
        own = {key: value for key, value in given.items() if link.takes(key)}
        base = link.build({**settings, "base": base}, own)
    assert base is not None  # there is a first name
    return base


@dataclass(frozen=True)
class _Link:
    """One name of a chain, loaded."""

    name: str
    factory: Factory
    parameters: list[str]

    @classmethod
    def load(cls, name: str) -> _Link:
        factory = plugins.load("optimizer", name)
        return cls(name, factory, plugins.parameters("optimizer", name, factory))

    def takes(self, parameter: str) -> bool:
        return parameter in self.parameters or any(known.startswith("**") for known in self.parameters)

    def build(self, settings: Mapping[str, Any], given: Mapping[str, Any]) -> PrivateOptimizer:
        built: PrivateOptimizer = plugins.call("optimizer", self.name, self.factory, settings, given)
        plugins.required("optimizer", self.name, built)
        return built


def _links(optimizer: str, base_optimizer: str) -> list[_Link]:
    """The chain from the outermost in; the last takes no base."""
    if "+" in optimizer and ":" not in optimizer:
        first, _, rest = optimizer.partition("+")
        raise PluginError(f"optimizer={optimizer!r} is one name; write optimizer={first!r}, base_optimizer={rest!r}")
    links, where = [_Link.load(optimizer)], f"base_optimizer={base_optimizer!r}"
    if "base" not in links[0].parameters:
        if base_optimizer != PLAIN:
            raise PluginError(
                f"{where} has nothing to be the base of: optimizer={optimizer!r} takes none; leave it at {PLAIN!r}"
            )
        return links
    for name in split_chain(base_optimizer):
        if not name:
            raise PluginError(f"{where} has an empty name; write names with one + between them, as in 'disk+adam'")
        if name in (link.name for link in links):
            raise PluginError(f"{where} under optimizer={optimizer!r} names {name!r} twice; name it once")
        if "base" not in (last := links[-1]).parameters:
            raise PluginError(f"{where}: {last.name!r} takes no base, so {name!r} is none for it; put it last")
        try:
            links.append(_Link.load(name))
        except PluginError as error:
            raise PluginError(f"{where}: {error}") from error
    return [*links, _Link.load(PLAIN)] if "base" in links[-1].parameters else links


def _given(links: Sequence[_Link], settings: Mapping[str, Any], arguments: str) -> dict[str, Any]:
    given, where = plugins.parse_arguments("optimizer", arguments), f"optimizer_args={arguments!r}"
    for key in given:
        if key in settings or key == "base":
            raise PluginError(f"{where}: {key!r} is a setting of its own; set it as that")
        if not any(link.takes(key) for link in links):
            known = sorted({name for link in links for name in link.parameters} - settings.keys() - {"base"})
            near = difflib.get_close_matches(key, known, n=3) or known
            raise PluginError(
                f"{where}: {' over '.join(link.name for link in links)} takes no {key!r}; "
                + (f"did you mean {', '.join(near)}?" if near else "it takes none")
            )
    return given
