"""One parameter that several calls use: per-example gradients of a sum of products, without making them.

With A and B the gradients of an example by two uses, |A + B|^2 = |A|^2 + 2 <A, B> + |B|^2. Uses of one kind are one
product over the positions of all. For a table of words, A = sum_t e(w_t) g_t^T, that is the matrix of a linear layer
too, B = sum_s o_s x_s^T (a language model with a tied head), <A, B> = sum_{s,t} o_s[w_t] <x_s, g_t>.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.step.gradients import linear
from fed_dpsat.step.gradients.contribution import Contribution, Rows
from fed_dpsat.step.gradients.product import CANCELLATION, Product


def shared(parts: list[Contribution]) -> Contribution | None:
    """The sum of ``parts``, example by example; None if only rows can be added up."""
    products = [part for part in parts if isinstance(part, Product)]
    heads = [part for part in products if linear.is_linear(part)]
    tables = [part for part in products if not part.inputs.is_floating_point()]
    if len(heads) + len(tables) < len(parts) or len(tables) > 1:
        return None
    head = linear.joined(heads) if heads else None
    if head is None or not tables:
        return head
    return _tied(tables[0], head)


def _tied(table: Product, head: Product) -> Contribution:
    words, slopes = table.inputs, table.outputs
    at_words = head.outputs.gather(2, words[:, None].expand(-1, head.outputs.shape[1], -1))
    inner = torch.bmm(head.inputs.double(), slopes.double().transpose(1, 2))  # biased by equal numbers in float32
    cross = (at_words * inner).sum((1, 2))
    size = table.norms + head.norms
    norms = size + 2 * cross
    unsure = (size > CANCELLATION * norms) | table.unsure | head.unsure
    exact = None
    if bool(unsure.any()):
        some = [part.each(part.inputs[unsure], part.outputs[unsure]) for part in (table, head)]
        exact = Rows(data=some[0] + some[1])
        norms = norms.masked_scatter(unsure, exact.squared_norms())
    return Tied(parts=[table, head], norms=norms, unsure=unsure, exact=exact)


@dataclass(frozen=True, kw_only=True)
class Tied:
    """The sum of ``parts``; ``exact`` holds the rows of the examples ``unsure[B]``, None if there are none."""

    parts: list[Product]
    norms: Tensor
    unsure: Tensor
    exact: Rows | None

    def squared_norms(self) -> Tensor:
        """``[B]``."""
        return self.norms

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """The sums of the parts."""
        sure = finite
        if self.exact is not None:
            sure = ~self.unsure if finite is None else finite & ~self.unsure
        each = [part.sum_of(factors, sure) for part in self.parts]
        if self.exact is not None:
            kept = None if finite is None else finite[self.unsure]
            each.append(self.exact.weighted_sum(factors[self.unsure], kept))
        return functools.reduce(torch.add, each)

    def rows(self) -> Tensor:
        """``[B, *shape]``."""
        return functools.reduce(torch.add, (part.rows() for part in self.parts))
