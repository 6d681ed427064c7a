"""The hooks of Opacus behind the interface of the engines: slow, familiar, a cross-check."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor

from fed_dpsat.clipping import ClippingRule
from fed_dpsat.draws import of_batch
from fed_dpsat.engines.contribution import MAY_MIX
from fed_dpsat.engines.drawing import Drawing, Pass, Undrawn, check_drawn
from fed_dpsat.engines.finite import finite_factors, keep, squared_norm_rows
from fed_dpsat.engines.loss import ModelLoss
from fed_dpsat.engines.probe import refusal
from fed_dpsat.errors import ModelError, SettingError
from fed_dpsat.generators import Mark
from fed_dpsat.params import Params
from fed_dpsat.query import At, LossFn, Query, simplified


def opacus_sum(
    loss_fn: LossFn, at: At, inputs: Tensor, targets: Tensor, clipping: ClippingRule, mode: str = "hooks"
) -> tuple[Params, int]:
    """Clipped sum over ``inputs[B, ...]``, ``B`` at least 1, and how many examples were not finite.

    ``mode`` is that of Opacus' ``GradSampleModule``: ``hooks``, ``ew`` or ``functorch``. Raises ``SettingError``
    for a loss that is not a ``ModelLoss`` and a query of more than one point, ``ModelError`` for a module whose
    examples mix: hooks would not notice.
    """
    params = simplified(at)
    if isinstance(params, Query):
        raise SettingError(
            "engine",
            "opacus",
            "for an optimizer that asks for more than one plain gradient (weighted points, a mask, a loss of its own)",
            "use 'auto' or 'vmap'",
        )
    if not isinstance(loss_fn, ModelLoss):
        raise SettingError("engine", "opacus", "for a loss other than ModelLoss", "use 'auto' or 'vmap'")
    if (reason := refusal(loss_fn, params, inputs, targets)).endswith(MAY_MIX):
        raise ModelError(f"{type(loss_fn.module).__name__}: {reason}")
    rows = per_example(loss_fn, params, inputs, targets, mode)
    factors, finite, num_nonfinite = finite_factors({n: squared_norm_rows(g) for n, g in rows.items()}, clipping)
    total = {
        name: (factors[name].to(g) @ keep(g, finite).reshape(len(g), -1)).view(g.shape[1:]) for name, g in rows.items()
    }
    return total, num_nonfinite


def per_example(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor, mode: str) -> Params:
    """Per-example gradients ``[B, *shape]`` by parameter; zeros where Opacus found none."""
    from opacus.grad_sample.utils import wrap_model  # type: ignore[import-untyped]  # seconds: imported when needed

    module = copy.deepcopy(loss_fn.module)
    for name, p in module.named_parameters():
        p.requires_grad_(name in params)
        if name in params:
            p.data = params[name].detach().clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        wrapped = wrap_model(module, grad_sample_mode=mode, loss_reduction="sum")
        mark = Mark.here(inputs.device)
        try:
            with Drawing(Pass(of_batch(len(inputs)))):
                total = loss_fn.criterion(wrapped(inputs), targets).sum()
            torch.autograd.backward(total)
            check_drawn(mark)
        except Undrawn as undrawn:
            mark.moved()
            raise ModelError(f"{type(loss_fn.module).__name__}: {undrawn}; set engine=auto") from None
    named = dict(module.named_parameters())
    rows = {}
    for name, value in params.items():
        sample = getattr(named[name], "grad_sample", None)
        rows[name] = value.new_zeros(len(inputs), *value.shape) if sample is None else sample.detach()
    return rows
