"""What one layer adds to one parameter's per-example gradients: norms first, then a weighted sum.

A layer either holds its per-example gradients (``Rows``) or the factors they are products of, whichever is
cheaper; both answer the same three questions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fed_dpsat.engines.finite import keep, squared_norm_rows


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


def as_they_are(rows: Tensor) -> Tensor:
    """``[K, *shape] -> [K, *shape]``."""
    return rows


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Materialised: ``data[B, ...]`` in any layout, and ``to_shape``: ``[K, ...] -> [K, *shape]``, a view."""

    data: Tensor
    to_shape: Callable[[Tensor], Tensor] = as_they_are

    def squared_norms(self) -> Tensor:
        """``[B]``."""
        return squared_norm_rows(self.data)

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """One pass over the rows."""
        total = factors.to(self.data) @ keep(self.data, finite).flatten(1)
        return self.to_shape(total.view(1, *self.data.shape[1:]))[0]

    def rows(self) -> Tensor:
        """The rows themselves."""
        return self.to_shape(self.data)


@dataclass(frozen=True, kw_only=True)
class Product:
    """Never materialised: a sum over positions of outer products of ``inputs[B, ...]`` and ``outputs[B, ...]``.

    ``outputs`` are gradients. ``of(inputs, outputs)`` is the ordinary gradient ``[*shape]`` of a whole batch, so
    the weighted sum is that of weighted outputs. ``norms[B]`` are the squared norms, ``each`` makes the rows.
    """

    inputs: Tensor
    outputs: Tensor
    norms: Tensor
    of: Callable[[Tensor, Tensor], Tensor]
    each: Callable[[Tensor, Tensor], Tensor]

    def squared_norms(self) -> Tensor:
        """``[B]``."""
        return self.norms

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """One ordinary weight gradient."""
        weights = factors.to(self.outputs).view(-1, *[1] * (self.outputs.ndim - 1))
        inputs = keep(self.inputs, finite) if self.inputs.is_floating_point() else self.inputs
        return self.of(inputs, keep(self.outputs, finite) * weights)

    def rows(self) -> Tensor:
        """``[B, *shape]``."""
        return self.each(self.inputs, self.outputs)


LARGEST_SQUARE = 1e16
"""Beyond this, or so far below that it is no float32, a product of squares says little about the square."""


def product_norms(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Squared norms ``[B]`` of ``sum_t inputs[B, t, :] outputs[B, t, :]^T`` from the two Gram matrices.

    |sum_t a_t g_t^T|^2 = sum_{s,t} (a_s . a_t)(g_s . g_t) (Goodfellow 2015; Li et al. 2022, "ghost clipping").
    Raises ``Unplanned`` for values above 1e8, whose squares this would multiply by squares that vanished.
    """
    if inputs.shape[1] == 1:
        a, g = (torch.linalg.vector_norm(t, dim=(1, 2)) for t in (inputs, outputs))
        check_range(a.square(), g.square())
        return (a * g).square()
    return gram_norms(torch.bmm(inputs, inputs.transpose(1, 2)), torch.bmm(outputs, outputs.transpose(1, 2)))


def gram_norms(inputs: Tensor, outputs: Tensor) -> Tensor:
    """``sum_{s,t} inputs[B, s, t] outputs[B, s, t]``, ``[B]``; raises as ``product_norms``."""
    check_range(inputs.diagonal(dim1=1, dim2=2), outputs.diagonal(dim1=1, dim2=2))
    return torch.linalg.vecdot(inputs.flatten(1), outputs.flatten(1)).clamp(min=0)


def check_range(*squares: Tensor) -> None:
    """Raise ``Unplanned`` for squares above ``LARGEST_SQUARE``; NaN passes, and is dropped as not finite."""
    if any(bool((s > LARGEST_SQUARE).any()) for s in squares):
        raise Unplanned("activations or gradients above 1e8")
