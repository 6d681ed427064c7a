"""What a private optimizer is: two pure functions around the private gradient.

``query_point`` and ``update`` never see an example or a raw gradient. That signature is the privacy
argument: whatever they compute is post-processing of private gradients, and a step costs exactly the event
of its mechanism.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, global_norm
from fed_dpsat.step.query import At
from fed_dpsat.step.subspace import Coordinates, Span

State = dict[str, Params]
"""Slots of named tensors, so that any state can be stored, sent between processes and resumed."""

ASCENT = "ascent"
"""The slot that holds the direction a sharpness-aware method climbs next; what ``ascent_memory`` is about."""

CLOCK = "clock"

NOISE = "noise"
"""The slot in which the loop says how much noise is in a private gradient; who needs that makes it in ``init``."""


Update = Callable[[Params, Params, State], tuple[Params, State]]


class PrivateOptimizer(Protocol):
    """State goes in and comes out; nothing is changed in place.

    ``update_owned``, where there is one beside ``update``, does the same to the bit with a private gradient that is
    given away: it may write into it, and leave the new parameters or state in its memory.
    """

    def init(self, params: Params) -> State:
        """The state before the first step."""

    def query_point(self, params: Params, state: State) -> At:
        """Where the next gradient is taken, or a ``Query``; public information only."""

    def update(self, params: Params, private_gradient: Params, state: State) -> tuple[Params, State]:
        """The next parameters and state; pure post-processing of ``private_gradient``."""


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


def set_clock(state: State, step: int) -> State:
    """``state`` with its step count set: learning rate schedules follow the federation, not the client."""
    return {**state, CLOCK: {"step": torch.tensor(step)}}


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


def set_noise(state: State, std: float) -> State:
    """``state`` with the standard deviation of the noise in a coordinate of the private gradient, if it asks for it.

    A public number: ``noise_multiplier * clip_norm / expected_batch_size`` of the step.
    """
    return {**state, NOISE: {"std": torch.tensor(std, dtype=torch.float64)}} if NOISE in state else state


def climb(params: Params, direction: Params | None, rho: float) -> Params:
    """``params + rho * direction / |direction|``, norm over all parameters; 0/0 is 0, so is no direction."""
    if direction is None or rho == 0:
        return params
    norm = global_norm(direction)
    scale: Tensor = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    return {name: torch.addcmul(p, scale.to(p), direction[name]) for name, p in params.items()}
