"""Optimizers over optimizers, by name: ``dp-sat`` over ``disk`` over ``adam``.

``optimizer = "dp-sat"``, ``base_optimizer = "disk+adam"``. Each is built with the next as its ``base``; where the last
one wants a base too, that is ``dp-sgd``.

========================================= ==================================================
case                                      what happens
========================================= ==================================================
an optimizer that takes no base           ``PluginError`` unless it is the last
one of them twice                         ``PluginError``
one that overwrites its base's state       ``PluginError``: two that keep the same slot
an argument that none of them takes       ``PluginError`` with near ones
an argument that is a setting             ``PluginError``: one value has one place
an argument that two of them take         both get it
one around a base of another space        ``SettingError``: dp-sat has nothing to climb over zeroth-order
========================================= ==================================================
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fed_dpsat import plugins
from fed_dpsat.params import Params
from fed_dpsat.plugins import Factory, PluginError
from fed_dpsat.step.optimizers.base import CLOCK, NOISE, PrivateOptimizer, State, set_clock
from fed_dpsat.step.query import At, first_point

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
    below = ""
    for link in reversed(links):
        own = {key: value for key, value in given.items() if link.takes(key)}
        if base is not None:
            watched = _Watched(base)
            if lost := _lost(link.build({**settings, "base": watched}, own), watched):
                raise PluginError(
                    f"optimizer={link.name!r} and its base {below!r} both keep {min(lost)!r} in the state, so the "
                    "base would find what is not its own; take one of them"
                )
        base, below = link.build({**settings, "base": base}, own), link.name
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


SHARED = frozenset({CLOCK, NOISE})
"""Slots that the loop fills, for whoever reads them."""


class _Watched:
    """``base``, and which of its slots it does not find again as it left them."""

    def __init__(self, base: PrivateOptimizer) -> None:
        self._base = base
        self._own: set[str] = set()
        self._left: State = {}
        self.lost: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def init(self, params: Params) -> State:
        self._left = self._base.init(params)
        self._own = set(self._left)
        return self._left

    def query_point(self, params: Params, state: State) -> At:
        self._compare(state)
        return self._base.query_point(params, state)

    def update(self, params: Params, private_gradient: Params, state: State) -> tuple[Params, State]:
        self._compare(state)
        moved, self._left = self._base.update(params, private_gradient, state)
        self._own |= {slot for slot, kept in self._left.items() if state.get(slot) is not kept}
        return moved, self._left

    def _compare(self, state: State) -> None:
        self.lost |= {slot for slot in self._own - SHARED if state.get(slot) is not self._left.get(slot)}


def _lost(outer: PrivateOptimizer, base: _Watched) -> set[str]:
    """Slots of ``base`` that ``outer`` takes away or puts something else into, in a few steps of two parameters.

    The steps are made as the loop makes them, so a base that answers in another space is met here and not in a run.
    """
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    with torch.random.fork_rng(devices=[]):
        state = set_clock(outer.init(params), 0)
        for _ in range(PROBE_STEPS):
            asked = first_point(outer.query_point(params, state))
            params, state = outer.update(params, {name: torch.ones_like(p) for name, p in asked.items()}, state)
    return base.lost


PROBE_STEPS = 5
"""A two-step method comes back to its base in the fourth."""
