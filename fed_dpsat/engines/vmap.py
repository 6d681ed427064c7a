"""The reference engine: every per-example gradient in memory, any module that ``torch.func`` can map over."""

from __future__ import annotations

from torch import Tensor
from torch.func import grad, vmap

from fed_dpsat.clipping import ClippingRule
from fed_dpsat.engines.finite import finite_factors, keep, squared_norm_rows
from fed_dpsat.engines.loss import LossFn
from fed_dpsat.params import Params


def vmap_sum(
    loss_fn: LossFn, params: Params, inputs: Tensor, targets: Tensor, clipping: ClippingRule
) -> tuple[Params, int]:
    """Clipped sum over ``inputs[B, ...]``, ``B`` at least 1, and how many examples were not finite."""

    def loss_of_one(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(p, x[None], y[None]).squeeze(0)

    gradients = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")(params, inputs, targets)
    rows = {name: g.reshape(len(g), -1) for name, g in gradients.items()}
    factors, finite, num_nonfinite = finite_factors({n: squared_norm_rows(g) for n, g in rows.items()}, clipping)
    total = {name: (factors[name].to(g) @ keep(g, finite)).view_as(params[name]) for name, g in rows.items()}
    return total, num_nonfinite
