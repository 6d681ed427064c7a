"""Embeddings: the per-example gradient has one row per word that occurs, so norms need equal words only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.step.gradients.contribution import Contribution, Rows, Unplanned, wide
from fed_dpsat.step.gradients.linear import Roles
from fed_dpsat.step.gradients.product import bounded_norms, gram, product


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """``words[B, *] -> [B, *, D]``; the row ``padding`` gets no gradient, -1 for none."""

    words: int
    padding: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what the backward pass needs."""
        return functional.embedding(x, weight), (x,)

    def backward(
        self, grad: Tensor, weight: Tensor, saved: tuple[Tensor, ...], need_input: bool, roles: tuple[str, ...]
    ) -> tuple[Tensor | None, Roles]:
        """No gradient of words; the contribution to the table."""
        words = saved[0].reshape(len(grad), -1)
        grad = wide(grad).reshape(*words.shape, -1)
        return None, {"weight": self._product(words, grad.masked_fill((words == self.padding)[..., None], 0))}

    def _product(self, words: Tensor, grad: Tensor) -> Contribution:
        same = (words[:, :, None] == words[:, None, :]).to(grad)
        norms = bounded_norms(same, gram(grad), grad.shape[2])
        return product(words, grad, of=self._of, each=self._each, together=self._together, norms=norms)

    def _together(self, words: Tensor, grad: Tensor, rows: int) -> Contribution:
        words, grad = (t.reshape(len(t) // rows, -1, *t.shape[2:]) for t in (words, grad))
        if words.shape[1] > self.words:  # a table is smaller than which of the words are the same
            return Rows(data=self._each(words, grad))
        return self._product(words, grad)

    def _of(self, words: Tensor, grad: Tensor) -> Tensor:
        return grad.new_zeros(self.words, grad.shape[-1]).index_add(0, words.flatten(), grad.flatten(0, 1))

    def _each(self, words: Tensor, grad: Tensor) -> Tensor:
        rows = grad.new_zeros(len(words), self.words, grad.shape[-1])
        return rows.scatter_add(1, words[..., None].expand_as(grad), grad)


def bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``torch.nn.functional.embedding_bag`` of bags ``[*, T]`` of one length, by an embedding.

    Raises ``Unplanned`` for bags of ``offsets``.
    """
    if offsets is not None:
        raise Unplanned("embedding_bag with offsets")
    rows = functional.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    if padding_idx is None:
        return rows.max(-2).values if mode == "max" else getattr(rows, mode)(-2)
    kept = input.ne(padding_idx % len(weight))[..., None]
    if mode == "max":
        most = rows.masked_fill(~kept, -torch.inf).max(-2).values
        return torch.where(kept.any(-2), most, 0)
    total = rows.masked_fill(~kept, 0).sum(-2)
    return total if mode == "sum" else total / kept.sum(-2).clamp(min=1)
