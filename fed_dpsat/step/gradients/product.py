"""Per-example gradients that are sums of outer products: norms without the gradients (ghost clipping).

|sum_t a_t g_t^T|^2 = sum_{s,t} (a_s . a_t)(g_s . g_t): two Gram matrices (Goodfellow 2015; Li et al. 2022).

That sum may cancel, and a norm that is the difference of large numbers could come out far too small: the bound
would not hold. So where the result is small beside the Gram matrices, or squares leave the range of a float32,
an example's gradient is made after all, for the norm and for the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.step.gradients.contribution import Contribution, Rows
from fed_dpsat.step.gradients.finite import keep, squared_norm_rows

CANCELLATION = 16.0
"""How much larger than the squared norm the product of the Gram matrices' norms may be."""

ABOVE = 4e-3
"""By how much of itself a bound may be above a squared norm before the gradient is made instead."""

LARGEST_SQUARE = 1e16
"""Beyond this one factor may be large where the square of the other has vanished."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """Never materialised but for few: sums over positions of products of ``inputs[B, ...]``, ``outputs[B, ...]``.

    ``outputs`` are gradients. ``of(inputs, outputs)`` is the ordinary gradient ``[*shape]`` of a whole batch, so
    the weighted sum is that of weighted outputs; ``each`` makes rows ``[K, *shape]``. ``norms[B]`` are squared;
    ``exact`` holds the rows of the examples ``unsure[B]``, None if there are none. A convolution leaves the Gram
    matrices of its patches, how it applies other weights to inputs, and what it ``made`` of them without its bias, for
    weights that are functions. ``together(inputs, outputs, R)`` holds what ``R`` examples each add together.
    """

    inputs: Tensor
    outputs: Tensor
    of: Callable[[Tensor, Tensor], Tensor]
    each: Callable[[Tensor, Tensor], Tensor]
    together: Callable[[Tensor, Tensor, int], Contribution]
    norms: Tensor
    unsure: Tensor
    exact: Rows | None
    inputs_gram: Tensor | None = None
    apply: Callable[[Tensor, Tensor], Tensor] | None = None
    made: Tensor | None = None

    def squared_norms(self) -> Tensor:
        """``[B]``."""
        return self.norms

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """One ordinary weight gradient."""
        if self.exact is None:
            return self.sum_of(factors, finite)
        sure = ~self.unsure if finite is None else finite & ~self.unsure
        kept = None if finite is None else finite[self.unsure]
        return self.sum_of(factors, sure) + self.exact.weighted_sum(factors[self.unsure], kept)

    def sum_of(self, factors: Tensor, some: Tensor | None) -> Tensor:
        """Of the products of ``some[B]`` examples, None for all; factors go where they cost least."""
        weights = factors.to(self.outputs).view(-1, *[1] * (self.outputs.ndim - 1))
        inputs = keep(self.inputs, some) if self.inputs.is_floating_point() else self.inputs
        outputs = keep(self.outputs, some)
        if inputs.is_floating_point() and inputs.ndim == 3 and inputs.shape[1] > 1 and inputs.numel() < outputs.numel():
            return self.of(inputs * weights, outputs)
        return self.of(inputs, outputs * weights)

    def rows(self) -> Tensor:
        """``[B, *shape]``."""
        return self.each(self.inputs, self.outputs)

    def bundled(self, rows: int) -> Contribution:
        """Of the factors, at the positions of all ``rows``."""
        return self.together(self.inputs, self.outputs, rows)


def product(
    inputs: Tensor,
    outputs: Tensor,
    *,
    of: Callable[[Tensor, Tensor], Tensor],
    each: Callable[[Tensor, Tensor], Tensor],
    together: Callable[[Tensor, Tensor, int], Contribution],
    norms: tuple[Tensor, Tensor],
    inputs_gram: Tensor | None = None,
    apply: Callable[[Tensor, Tensor], Tensor] | None = None,
    made: Tensor | None = None,
) -> Product:
    """A ``Product`` from its ``norms`` and which of them are unsure, as ``gram_norms`` gives them."""
    squared, unsure = norms
    exact = None
    if bool(unsure.any()):
        exact = Rows(data=each(inputs[unsure], outputs[unsure]))
        squared = squared.masked_scatter(unsure, exact.squared_norms())
    return Product(
        inputs=inputs,
        outputs=outputs,
        of=of,
        each=each,
        together=together,
        norms=squared,
        unsure=unsure,
        exact=exact,
        inputs_gram=inputs_gram,
        apply=apply,
        made=made,
    )


def single_norms(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms ``[B]`` of one outer product each, of ``inputs[B, I]`` and ``outputs[B, O]``; which are unsure."""
    a, g = squared_norm_rows(inputs), squared_norm_rows(outputs)
    return a * g, (a > LARGEST_SQUARE) | (g > LARGEST_SQUARE)


def gram_norms(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_{s,t} inputs[B, s, t] outputs[B, s, t]``, ``[B]``, and which of them are unsure."""
    squared, size, large = _sizes(inputs, outputs)
    unsure = (size > CANCELLATION * squared) | large
    return squared + torch.finfo(inputs.dtype).eps * size, unsure  # what rounding may have taken


def bounded_norms(inputs: Tensor, outputs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Upper bounds of the same, at most 0.4 % too large, and which are unsure.

    ``width`` is of how many numbers the inner products in both Gram matrices are. In any order of its terms, rounding
    moves an inner product by at most that many halves of eps times the norms of the rows (Higham 2002, section 3.1),
    so the sum moves by ``width`` halves of eps times the size of the matrices, which is added. Equal numbers come close
    to a thirtieth of that, random ones to nothing.
    """
    squared, size, large = _sizes(inputs, outputs)
    taken = (width * torch.finfo(inputs.dtype).eps / 2) * size
    return squared + taken, (taken > ABOVE * squared) | large


def _sizes(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over both Gram matrices, the product of their norms, and whether a row is too large for its squares."""
    squared = (inputs * outputs).sum((1, 2), dtype=torch.float64)
    size = (squared_norm_rows(inputs) * squared_norm_rows(outputs)).sqrt()
    largest = torch.maximum(*(t.diagonal(dim1=1, dim2=2).amax(1) for t in (inputs, outputs)))
    return squared, size, largest > LARGEST_SQUARE


def gram(rows: Tensor) -> Tensor:
    """``rows[B, T, D] -> [B, T, T]``, all inner products of the rows of one example."""
    return torch.bmm(rows, rows.transpose(1, 2))
