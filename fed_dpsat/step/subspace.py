"""Where a client's round can take the model, known to everybody beforehand: so fewer numbers say where it went.

All are functions of the seed of the run and the time, not of a client: a server derives them too, and what a reply says
of them is not believed.

================ ============================== =======================================
subspace         the numbers                    they say
================ ============================== =======================================
``Coordinates``  values of active coordinates   the model to the bit
``Span``         one per step and direction     the model up to rounding
================ ============================== =======================================
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed_dpsat.step.noise import derive_generator

CHUNK = 1 << 20
"""Numbers in float64 that are held at a time."""


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
    """``start`` plus any combination of the ``directions`` of each of the steps ``first`` to ``first + steps - 1``."""

    seed: int
    first: int
    steps: int
    directions: int = 1
    kind: ClassVar[str] = "span"

    def size(self, d: int) -> int:
        """One number per step and direction."""
        return self.steps * self.directions

    def numbers(self, start: Tensor, end: Tensor) -> Tensor:
        """Least squares in float64: how far along each direction; of some coordinates at a time, to save memory."""
        d, count = len(end), self.size(len(end))
        width = max(1, CHUNK // count)
        parts = [_parts(self.seed, self.first * self.directions + i, d, width) for i in range(count)]
        gram, along = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for low in range(0, d, width):
            directions = torch.stack([torch.from_numpy(next(part)) for part in parts]).double()
            moved = end[low : low + width].double() - start[low : low + width].double()
            gram, along = gram + directions @ directions.T, along + directions @ moved
        found: Tensor = torch.linalg.lstsq(gram, along[:, None]).solution[:, 0]
        return found.float()

    def end(self, start: Tensor, numbers: Tensor) -> Tensor:
        """One direction after the other, so that the bits are the same everywhere."""
        for i, number in enumerate(numbers.tolist()):
            start = torch.add(start, self._direction(i, len(start)), alpha=number)
        return start

    def _direction(self, i: int, d: int) -> Tensor:
        return direction(self.seed, self.first * self.directions + i, d)


Vector = NDArray[np.float32]

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
def direction(seed: int, number: int, d: int) -> Tensor:
    """Uniform on the sphere of radius sqrt(d), ``[d]``: the run's direction ``number``, the same for every client."""
    return torch.from_numpy(np.concatenate(list(_parts(seed, number, d, CHUNK))))


def _parts(seed: int, number: int, d: int, width: int) -> Iterator[Vector]:
    """The ``direction``, ``width`` coordinates at a time; drawn twice, so that no whole one is held in float64."""
    scale = d**0.5 / np.sqrt(sum(part.dot(part) for part in _normals(seed, number, d, CHUNK)))
    for part in _normals(seed, number, d, width):
        yield (part * scale).astype(np.float32)


def _normals(seed: int, number: int, d: int, width: int) -> Iterator[NDArray[np.float64]]:
    generator = derive_generator(seed, purpose="direction", round=number)
    for low in range(0, d, width):
        yield generator.standard_normal(min(width, d - low))


@functools.lru_cache(maxsize=2)
def _active(seed: int, round: int, frozen: int, d: int) -> Tensor:
    if frozen > d:
        raise ValueError(f"{frozen} frozen coordinates of {d}")
    active = np.ones(d, dtype=bool)
    if frozen:
        coins = derive_generator(seed, purpose="freeze", round=round).random(d)
        active[np.argpartition(coins, frozen - 1)[:frozen]] = False
    return torch.from_numpy(active)
