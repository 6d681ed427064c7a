"""What a private optimizer is: two pure functions around the private gradient.

``query_point`` and ``update`` never see an example or a raw gradient. That signature is the privacy
argument: whatever they compute is post-processing of private gradients, and a step costs exactly the event
of its mechanism.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, global_norm
from fed_dpsat.step.query import At
from fed_dpsat.step.subspace import Coordinates, Span

State = dict[str, Any]
"""A tree of named tensors, ``{name: tensor or tree}``, so that any state can be stored, sent and resumed."""

BASE = "base"
"""Where an optimizer over another keeps the state of that one."""

ASCENT = "ascent"
"""The direction that a sharpness-aware method climbs next; what ``ascent_memory`` is about."""


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What is public about a step: all that an optimizer may know beside parameters, private gradients and its state.

    ``index`` counts the steps of the federation from 0, so that schedules follow the federation and not the client;
    ``round`` counts from 1. ``noise_std`` is the standard deviation of the noise in a coordinate of the private
    gradient, ``noise_multiplier * clip_norm / expected_batch_size``: a tensor, float64 and 0-d, because clients that
    train together may have different ones.
    """

    index: int
    noise_std: Tensor
    round: int


Update = Callable[[Params, Params, State, StepInfo], tuple[Params, State]]


class PrivateOptimizer(Protocol):
    """State goes in and comes out; nothing is changed in place.

    ``update_owned``, where there is one beside ``update``, does the same to the bit with a private gradient that is
    given away: it may write into it, and leave the new parameters or state in its memory.

    ``carries`` names what of its state a client takes into its next round; all else begins as ``init`` makes it. Each
    name is one that ``init`` or the first steps make. An optimizer without ``carries`` takes all of its state.
    """

    def init(self, params: Params) -> State:
        """The state before the first step."""

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """Where the next gradient is taken, or a ``Query``; public information only."""

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The next parameters and state; pure post-processing of ``private_gradient``."""


@dataclass(frozen=True, kw_only=True)
class Over:
    """``base``, whose state stays under "base"; a subclass says what it asks or does otherwise, and what it keeps."""

    base: PrivateOptimizer

    def init(self, params: Params) -> State:
        """The state of ``base``, under its name."""
        return {BASE: self.base.init(params)}

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """Where ``base`` looks."""
        return self.base.query_point(params, state[BASE], info)

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base``; the rest of the state stays."""
        moved, after = self.base.update(params, private_gradient, state[BASE], info)
        return moved, {**state, BASE: after}


def links(optimizer: object) -> list[object]:
    """``optimizer`` and its bases."""
    found: list[object] = []
    while optimizer is not None and optimizer not in found:
        found.append(optimizer)
        optimizer = getattr(optimizer, "base", None)
    return found


def next_round(optimizer: PrivateOptimizer, params: Params, last: State) -> State:
    """The state that a round begins with, after one that ended with ``last``: what is carried, and else ``init``."""
    return _kept(optimizer, optimizer.init(params), last)


def _kept(optimizer: object, fresh: State, last: State) -> State:
    base, names = getattr(optimizer, "base", None), getattr(optimizer, "carries", None)
    own = {name: kept for name, kept in last.items() if names is None or name in names}
    below = {BASE: _kept(base, fresh[BASE], last[BASE])} if base is not None and BASE in fresh else {}
    return {**fresh, **own, **below}


def unknown_carried(optimizer: object, states: Sequence[State]) -> str:
    """What is wrong with ``carries`` of ``optimizer`` or of a base: a name that none of ``states`` has; or empty.

    It is wrong if there is other state, which is lost: an optimizer may keep nothing, as one with momentum 0.
    """
    known = {str(name) for state in states for name in state} - {BASE}
    names = getattr(optimizer, "carries", None) or ()
    lost = known - set(names)
    for name in names if lost else ():
        if name not in known:
            near = difflib.get_close_matches(str(name), lost, n=3) or sorted(lost)
            hint = ", ".join(map(repr, near))
            return f"{name!r}, which no state of {type(optimizer).__name__} has (did you mean {hint}?)"
    base, below = getattr(optimizer, "base", None), [state[BASE] for state in states if BASE in state]
    return unknown_carried(base, below) if base is not None and below else ""


def carried_names(optimizer: object) -> set[str]:
    """What ``next_round`` takes over, by name; "all of" a class that does not say."""
    base, names = getattr(optimizer, "base", None), getattr(optimizer, "carries", None)
    own = {f"all of {type(optimizer).__name__}"} if names is None else set(names)
    return own | (carried_names(base) if base is not None else set())


def owned_update(optimizer: PrivateOptimizer) -> Update:
    """``update_owned`` of ``optimizer``, for who has no more use for a private gradient; else its ``update``.

    One that is inherited by a class with an ``update`` of its own does not know of that, and is left alone.
    """
    for where in (optimizer, *type(optimizer).__mro__):
        found = {"update", "update_owned"} & getattr(where, "__dict__", {}).keys()
        if found:
            update: Update = getattr(optimizer, "update_owned" if len(found) == 2 else "update")
            return update
    return optimizer.update


def check_space(setting: str, value: object, params: Params, other: Params) -> None:
    """Raise ``SettingError`` unless ``other``, a point or a gradient, is one of the parameters."""
    if other.keys() != params.keys():
        raise SettingError(
            setting,
            value,
            f"possible around a base whose private gradient is of {sorted(other)}, not of the model's parameters",
            "take another base optimizer",
        )


def subspace_of(optimizer: PrivateOptimizer, round: int, d: int) -> Coordinates | Span | None:
    """Where ``optimizer`` can take ``d`` coordinates in ``round`` (from 1); None where it says nothing.

    Its own ``subspace(round, d)``; or that of its base, for one with ``moves_like_base``: each of its updates is one of
    ``base``, from the same parameters.
    """
    own = getattr(optimizer, "subspace", None)
    if own is not None:
        found: Coordinates | Span | None = own(round, d)
        return found
    base = getattr(optimizer, "base", None)
    return subspace_of(base, round, d) if base is not None and getattr(optimizer, "moves_like_base", False) else None


def climb(params: Params, direction: Params | None, rho: float) -> Params:
    """``params + rho * direction / |direction|``, norm over all parameters; 0/0 is 0, so is no direction."""
    if direction is None or rho == 0:
        return params
    norm = global_norm(direction)
    scale: Tensor = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    return {name: torch.addcmul(p, scale.to(p), direction[name]) for name, p in params.items()}
