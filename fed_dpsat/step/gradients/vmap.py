"""The reference engine: every per-example gradient in memory, any module that ``torch.func`` can map over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from fed_dpsat.params import Params
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.draws import Draws, of_batch
from fed_dpsat.step.generators import Mark
from fed_dpsat.step.gradients import loop
from fed_dpsat.step.gradients.drawing import Drawing, Pass, Undrawn, check_drawn
from fed_dpsat.step.gradients.finite import clipped_names, finite_factors, keep, squared_norm_rows
from fed_dpsat.step.query import At, LossFn, Query, as_query, compacted, zero_sum


def vmap_sum(loss_fn: LossFn, at: At, inputs: Tensor, targets: Tensor, clipping: ClippingRule) -> tuple[Params, int]:
    """Clipped sum over ``inputs[B, ...]``, ``B`` at least 1, and how many examples were not finite."""
    query = as_query(at)
    found = _rows_asked(loss_fn, query, inputs, targets)
    rows = {name: g.reshape(len(inputs), -1) for name, g in found.items()}
    norms = {name: squared_norm_rows(rows[name]) for name in clipped_names(rows)}
    factors, finite, num_nonfinite = finite_factors(norms, clipping)
    total = {
        name: (factors[name].to(rows[name]) @ keep(rows[name], finite)).view_as(zero) if name in factors else zero
        for name, zero in zero_sum(query).items()
    }
    return total, num_nonfinite


def _rows_asked(loss_fn: LossFn, query: Query, inputs: Tensor, targets: Tensor) -> Params:
    """Rows ``[B, *shape]`` of what ``query`` asks; by a ``loop`` if examples draw what no one pass can tell apart."""
    draws, begun = of_batch(len(inputs)), loop.Begun(loss_fn)
    loss = query.loss(begun) if query.loss else begun
    if not loop.needed(loss_fn):
        mark = Mark.here(inputs.device)
        try:
            loop.check_repeats(loss, begun, query.points[0][1], inputs, targets, draws)
            found = combined(query, _mapped(loss, begun, draws, inputs, targets))
            check_drawn(mark)
            return found
        except Undrawn as undrawn:
            reason = str(undrawn)
        except (RuntimeError, NotImplementedError) as error:
            reason = f"vmap refuses it: {str(error).strip().splitlines()[0]}"
        mark.moved()  # whatever was drawn, it is as if nothing was
        loop.remember(loss_fn, reason)
    return combined(query, loop.gradients(loss, begun, draws, inputs, targets))


def _mapped(
    loss: LossFn, begun: loop.Begun, draws: Draws, inputs: Tensor, targets: Tensor
) -> Callable[[Params], Params]:
    """At a point, the gradients ``[B, *shape]`` of ``loss``."""
    places = torch.arange(len(inputs), device=inputs.device)

    def loss_of_one(p: Params, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
        drawn = Pass(draws, row=place)
        begun.begin = drawn.begin
        with Drawing(drawn):
            return loss(p, x[None], y[None]).squeeze(0)

    rows = vmap(grad(loss_of_one), in_dims=(None, 0, 0, 0), randomness="different")
    return lambda point: rows(point, inputs, targets, places)


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
