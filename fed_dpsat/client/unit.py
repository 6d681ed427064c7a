"""The unit "client": one bound on the change of a whole client, over all its parameters together.

========================== ==================================================================
case                       the addition of the client
========================== ==================================================================
norm of its change <= C    the change
above                      the change, scaled to norm C
zero                       zero
NaN or inf in it           zero: a bounded function of its data like any other
share < 1                  its largest coordinates, bounded afterwards
========================== ==================================================================

Sources: McMahan et al. 2018 (arXiv 1710.06963), FlatClip; DP-FedSAM-top_k (arXiv 2305.00873) for the share. Clipping
each tensor to C instead makes the sensitivity C * sqrt(number of tensors), a mistake of public code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fed_dpsat.params import Params, cut, laid_end_to_end, subtract

ROUNDING = 2.0**-22
"""Relative to the norm of a model: the error of a move that float32 writes as a model, twice."""


def bounded(change: Params, clip_norm: float) -> Params:
    """``change`` times min(1, clip_norm / norm), one norm over all tensors; in float64, as the result is."""
    return _bounded({name: value.to(torch.float64, copy=True) for name, value in change.items()}, clip_norm)


def _bounded(own: Params, clip_norm: float) -> Params:
    """``bounded`` for a change in float64, in the memory of that change."""
    norm = _norm(own)
    if not math.isfinite(norm):
        return {name: torch.zeros_like(value) for name, value in own.items()}
    if norm > clip_norm:
        for value in own.values():
            value.mul_(clip_norm / norm)
    return own


def largest(change: Params, share: float) -> Params:
    """The ``ceil(share * d)`` coordinates of largest magnitude of all ``d`` together; the others are 0."""
    if share >= 1:
        return change
    flat = laid_end_to_end(change)
    kept = flat.abs().nan_to_num(nan=math.inf).topk(math.ceil(share * len(flat))).indices
    return cut(torch.zeros_like(flat).index_copy_(0, kept, flat[kept]), change)


def bounded_model(after: Params, before: Params, *, clip_norm: float, keep_share: float) -> Params:
    """The model that a client sends: ``before`` plus the bounded change to ``after``, in the types of ``before``."""
    change = bounded(largest(subtract(after, before), keep_share), clip_norm)
    return {name: change[name].add_(value).to(value.dtype) for name, value in before.items()}


def excess(after: Params, before: Params, clip_norm: float) -> float:
    """The norm of the move from ``before`` to ``after`` beyond ``clip_norm``; 0 if rounding explains it."""
    beyond = _norm(_move(after, before)) - clip_norm
    if beyond <= ROUNDING * clip_norm:  # for any norm of the model
        return 0.0
    return beyond if beyond > ROUNDING * (_norm(before) + clip_norm) else 0.0


def bounded_move(after: Params, before: Params, clip_norm: float) -> Params:
    """The move of a reply for the sum, in float64; its norm is at most ``clip_norm`` for any reply."""
    return _bounded(_move(after, before), clip_norm)


def _move(after: Params, before: Params) -> Params:
    """``after - before`` in float64, in new memory."""
    return {name: value.to(torch.float64, copy=True).sub_(before[name]) for name, value in after.items()}


def _norm(params: Params) -> float:
    flat: list[Tensor] = [value.double().flatten() for value in params.values()]
    return math.sqrt(sum(float(torch.dot(value, value)) for value in flat))
