"""The reference engine: every per-example gradient in memory, any module that ``torch.func`` can map over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from fed_dpsat.clipping import ClippingRule
from fed_dpsat.engines.finite import clipped_names, finite_factors, keep, squared_norm_rows
from fed_dpsat.params import Params
from fed_dpsat.query import At, LossFn, Query, as_query, compacted, zero_sum


def vmap_sum(loss_fn: LossFn, at: At, inputs: Tensor, targets: Tensor, clipping: ClippingRule) -> tuple[Params, int]:
    """Clipped sum over ``inputs[B, ...]``, ``B`` at least 1, and how many examples were not finite."""
    query = as_query(at)
    loss = query.loss(loss_fn) if query.loss else loss_fn

    def loss_of_one(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss(p, x[None], y[None]).squeeze(0)

    gradients = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")
    found = combined(query, lambda point: gradients(point, inputs, targets))
    rows = {name: g.reshape(len(inputs), -1) for name, g in found.items()}
    norms = {name: squared_norm_rows(rows[name]) for name in clipped_names(rows)}
    factors, finite, num_nonfinite = finite_factors(norms, clipping)
    total = {
        name: (factors[name].to(rows[name]) @ keep(rows[name], finite)).view_as(zero) if name in factors else zero
        for name, zero in zero_sum(query).items()
    }
    return total, num_nonfinite


def combined(query: Query, gradients: Callable[[Params], Params]) -> Params:
    """Rows ``[B, *shape]`` of the weighted sum over points of what ``gradients`` finds; with a mask ``[B, active]``."""
    total: Params = {}
    for weight, point in query.points:
        for name, g in compacted(query, gradients(point)).items():
            if name in total:
                total[name] = torch.add(total[name], g, alpha=weight)
            else:
                total[name] = g if weight == 1 else g * weight
    return total
