"""What one layer adds to one parameter's per-example gradients: norms first, then a weighted sum.

A layer either holds its per-example gradients (``Rows``) or the factors they are products of (``Product``),
whichever is cheaper; both answer the same three questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fed_dpsat.step.gradients.finite import keep, squared_norm_rows


class Unplanned(Exception):
    """A module, or values, that the planned engine has no exact way for; the message says which."""


class Contribution(Protocol):
    """Per-example gradients ``g[B, *shape]`` of one parameter, held one way or another."""

    def squared_norms(self) -> Tensor:
        """``[B]``."""

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """``sum_i factors[i] g[i]``, ``[*shape]``; examples that are not ``finite`` add nothing."""

    def rows(self) -> Tensor:
        """``[B, *shape]``, for a parameter that several layers share."""


def wide(t: Tensor) -> Tensor:
    """``t`` in float32 at least: what is clipped has to be what is summed, to more digits than bfloat16 has."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def as_they_are(rows: Tensor) -> Tensor:
    """``[K, *shape] -> [K, *shape]``."""
    return rows


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Materialised: ``data[B, ...]`` in any layout, ``to_shape``: ``[K, ...] -> [K, *shape]``, squared ``norms[B]``.

    ``filters``, for weights that are functions: squared norms, sums, and products with the weight, each ``[B, O]``.
    """

    data: Tensor
    to_shape: Callable[[Tensor], Tensor] = as_they_are
    norms: Tensor | None = None
    filters: tuple[Tensor, Tensor, Tensor] | None = None

    def squared_norms(self) -> Tensor:
        """``[B]``."""
        return squared_norm_rows(self.data) if self.norms is None else self.norms

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """One pass over the rows."""
        total = factors.to(self.data) @ keep(self.data, finite).reshape(len(self.data), -1)
        return self.to_shape(total.view(1, *self.data.shape[1:]))[0]

    def rows(self) -> Tensor:
        """The rows themselves."""
        return self.to_shape(self.data)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Rows of a few examples each, one after the other: a copy into one tensor would cost a pass over them."""

    parts: list[Rows]

    def squared_norms(self) -> Tensor:
        """``[B]``."""
        return torch.cat([part.squared_norms() for part in self.parts])

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """One pass over the rows."""
        sizes = [len(part.data) for part in self.parts]
        kept = [None] * len(sizes) if finite is None else list(torch.split(finite, sizes))
        total = self.parts[0].data.new_zeros(self.parts[0].data[0].numel())
        for part, some, good in zip(self.parts, torch.split(factors.to(total), sizes), kept, strict=True):
            total.addmv_(keep(part.data, good).reshape(len(some), -1).t(), some)
        first = self.parts[0]
        return first.to_shape(total.view(1, *first.data.shape[1:]))[0]

    def rows(self) -> Tensor:
        """All rows in one tensor."""
        return torch.cat([part.rows() for part in self.parts])


@runtime_checkable
class Factors(Contribution, Protocol):
    """A contribution that is not held as rows."""

    def bundled(self, rows: int) -> Contribution:
        """``bundled`` of it, of the factors themselves."""


def bundled(held: Rows | Parts | Factors, rows: int) -> Contribution:
    """What bundles of ``rows`` examples, one after the other, add together."""
    if isinstance(held, Factors):
        return held.bundled(rows)
    parts = held.parts if isinstance(held, Parts) else [held]
    return Rows(data=_sums([part.data for part in parts], rows), to_shape=parts[0].to_shape)


def _sums(parts: list[Tensor], rows: int) -> Tensor:
    """``[G, ...]``, sums of ``rows`` rows each of ``parts``, end to end."""
    if len(parts) == 1:
        return parts[0].view(-1, rows, *parts[0].shape[1:]).sum(1)
    total = parts[0].new_zeros(sum(map(len, parts)) // rows, *parts[0].shape[1:])
    start = 0
    for part in parts:
        bundle = torch.arange(start, start + len(part), device=part.device) // rows
        total.index_add_(0, bundle, part)
        start += len(part)
    return total


def together(parts: list[Rows]) -> Contribution:
    """The examples of ``parts``, at least one, in their order."""
    return parts[0] if len(parts) == 1 else Parts(parts=parts)


def versions(used: Iterable[Tensor | None]) -> list[int]:
    """How often each was written into."""
    return [0 if t is None else t._version for t in used]


def check_versions(used: Iterable[Tensor | None], before: list[int]) -> None:
    """Raise ``Unplanned`` for functions of parameters that were written into since they were used."""
    if versions(used) != before:
        raise Unplanned("a function of parameters that is written into after it is used")
