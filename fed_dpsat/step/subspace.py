"""Where a client's round can take the model, known to everybody beforehand: so fewer numbers say where it went.

All are functions of the seed of the run and the time, not of a client: a server derives them too, and what a reply says
of them is not believed.

================ ============================== =======================================
subspace         the numbers                    they say
================ ============================== =======================================
``Coordinates``  values of active coordinates   the model to the bit
``Span``         one per step                   the model up to rounding
================ ============================== =======================================
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.step.noise import derive_generator


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """All but ``frozen`` coordinates, which are drawn for ``round``; those keep the bits that they had."""

    seed: int
    round: int
    frozen: int
    kind: ClassVar[str] = "coordinates"

    def active(self, d: int) -> Tensor:
        """Bool mask ``[d]``; nobody may write to it."""
        return _active(self.seed, self.round, self.frozen, d)

    def size(self, d: int) -> int:
        """The number of active coordinates."""
        return d - self.frozen

    def numbers(self, start: Tensor, end: Tensor) -> Tensor:
        """Values of the active coordinates."""
        return end[self.active(len(end))]

    def check(self, start: Tensor, end: Tensor) -> None:
        """Raise ``RuntimeError`` where a frozen coordinate moved: what was sent would not tell."""
        moved = int((start != end).masked_fill(self.active(len(start)), False).sum())
        if moved:
            raise RuntimeError(f"{moved} coordinates moved that the optimizer says are frozen in round {self.round}")

    def end(self, start: Tensor, numbers: Tensor) -> Tensor:
        """``start``, with those in place."""
        return start.masked_scatter(self.active(len(start)), numbers)


@dataclass(frozen=True, kw_only=True)
class Span:
    """``start`` plus any combination of the directions of steps ``first`` to ``first + steps - 1``."""

    seed: int
    first: int
    steps: int
    kind: ClassVar[str] = "span"

    def size(self, d: int) -> int:
        """One number per step."""
        return self.steps

    def numbers(self, start: Tensor, end: Tensor) -> Tensor:
        """Least squares in float64: how far along each direction."""
        directions = torch.stack([self._direction(i, len(end)) for i in range(self.steps)]).double()
        gram, along = directions @ directions.T, directions @ (end.double() - start.double())
        found: Tensor = torch.linalg.lstsq(gram, along[:, None]).solution[:, 0]
        return found.float()

    def end(self, start: Tensor, numbers: Tensor) -> Tensor:
        """One direction after the other, so that the bits are the same everywhere."""
        for i, number in enumerate(numbers.tolist()):
            start = torch.add(start, self._direction(i, len(start)), alpha=number)
        return start

    def _direction(self, i: int, d: int) -> Tensor:
        return direction(self.seed, self.first + i, d)


KINDS: Mapping[str, type[Coordinates] | type[Span]] = {kind.kind: kind for kind in (Coordinates, Span)}


def described(subspace: Coordinates | Span) -> dict[str, Any]:
    """As scalars, for a message."""
    return {"kind": subspace.kind, **dataclasses.asdict(subspace)}


def read_subspace(said: Mapping[str, Any]) -> Coordinates | Span:
    """What ``described`` was given; raises ``ValueError`` for what it never says."""
    values = dict(said)
    kind = KINDS.get(str(values.pop("kind", "")))
    if kind is None or set(values) != {f.name for f in dataclasses.fields(kind)}:
        raise ValueError(f"{dict(said)} describes no subspace")
    if not all(type(value) is int and value >= 0 for value in values.values()):
        raise ValueError(f"{dict(said)} describes no subspace: whole numbers, at least 0")
    return kind(**values)


@functools.lru_cache(maxsize=2)
def direction(seed: int, step: int, d: int) -> Tensor:
    """Uniform on the sphere of radius sqrt(d), ``[d]``; of the run's ``step``, the same for every client."""
    drawn = derive_generator(seed, purpose="direction", round=step).standard_normal(d)
    return torch.from_numpy((drawn * (d**0.5 / np.linalg.norm(drawn))).astype(np.float32))


@functools.lru_cache(maxsize=2)
def _active(seed: int, round: int, frozen: int, d: int) -> Tensor:
    if frozen > d:
        raise ValueError(f"{frozen} frozen coordinates of {d}")
    active = np.ones(d, dtype=bool)
    if frozen:
        coins = derive_generator(seed, purpose="freeze", round=round).random(d)
        active[np.argpartition(coins, frozen - 1)[:frozen]] = False
    return torch.from_numpy(active)
