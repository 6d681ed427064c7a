"""Without a bound, the sum of per-example gradients is the gradient of the summed loss: one ordinary pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fed_dpsat.params import Params
from fed_dpsat.step.bundles import Bundles
from fed_dpsat.step.clipping import ClippingRule, FlatClipping
from fed_dpsat.step.examples import Examples, count, device_of
from fed_dpsat.step.generators import Mark
from fed_dpsat.step.gradients.call import modules
from fed_dpsat.step.gradients.capture import Capture
from fed_dpsat.step.gradients.drawing import check_drawn
from fed_dpsat.step.gradients.formats import turn_gradients
from fed_dpsat.step.gradients.loss import ModelLoss
from fed_dpsat.step.gradients.routes import routes_of
from fed_dpsat.step.gradients.state import afresh
from fed_dpsat.step.query import At, LossFn, as_query, compact


def unbounded(clipping: ClippingRule) -> bool:
    """Whether ``clipping`` leaves every finite gradient as it is, and looks at no norm."""
    return type(clipping) is FlatClipping and math.isinf(clipping.clip_norm)


def plain_query_sum(
    loss_fn: LossFn, at: At, inputs: Examples, targets: Examples, bundles: Bundles | None = None
) -> Params | None:
    """``plain_sum`` of each point, weighted, on what is active; None where that may not be the sum over examples.

    Weights whose absolute values add up to more than 1 could make an example's finite gradients overflow.
    """
    query = as_query(at)
    if query.loss or query.slopes or math.fsum(abs(weight) for weight, _ in query.points) > 1 + 1e-9:
        return None
    total: Params = {}
    for weight, point in query.points:
        found = plain_sum(loss_fn, point, inputs, targets, bundles)
        if found is None:
            return None
        for name, g in compact(query, found).items():
            total[name] = torch.add(total[name], g, alpha=weight) if name in total else g * weight
    return total


def plain_sum(
    loss_fn: LossFn, params: Params, inputs: Examples, targets: Examples, bundles: Bundles | None = None
) -> Params | None:
    """Sum of gradients over ``inputs[B, ...]``; None where it is not finite.

    inf and NaN never cancel in a sum, so a finite one has no example to drop. Else the examples have to be looked at;
    also if they draw what one pass cannot tell apart, and then generators are as before.
    """
    mark = Mark.here(device_of(targets))
    if isinstance(inputs, Tensor) and inputs.ndim > 4:
        inputs = inputs.contiguous()  # torch's GroupNorm crashes on volumes whose channels are last
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    wanted = list(leaves.values())
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and _has_group_norm(loss_fn):
        inputs = inputs.detach().requires_grad_()  # and on images whose gradient nobody asks for
        wanted.append(inputs)
    with torch.enable_grad():
        try:
            with afresh(loss_fn) as own:
                losses = Capture(count(targets), routes_of(loss_fn)).losses(own, leaves, inputs, targets)
            total = (losses if bundles is None else bundles.weighted(losses)).sum()
            found = _gradients(total, wanted)[: len(leaves)]
            check_drawn(mark)
        except Exception:  # the way over single gradients says what it is
            mark.moved()
            return None
    if not bool(torch.stack([gradient.sum() for gradient in found]).isfinite().all()):
        return None
    return dict(zip(params, _owned(found), strict=True))


def _gradients(total: Tensor, wanted: list[Tensor]) -> Sequence[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(p) for p in wanted]
    turn_gradients(total)
    return torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)


def _owned(gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each with memory of its own: autograd gives both terms of a sum one tensor, and all terms of another a number."""
    seen: set[int] = set()
    for g in gradients:
        where = g.untyped_storage()._cdata  # not data_ptr, which a tensor that wraps another has none of
        yield g.clone(memory_format=torch.contiguous_format) if where in seen or 0 in g.stride() else g
        seen.add(where)


def _has_group_norm(loss_fn: LossFn) -> bool:
    return isinstance(loss_fn, ModelLoss) and any(isinstance(m, nn.GroupNorm) for m in modules(loss_fn.module))
