"""The hooks of Opacus beside the planned engine: a familiar cross-check of every sum.

Opacus' layers are not torch's in every setting, and it says so in few: 1.6 pads with zeros whatever ``padding_mode``
is, trains the row of ``padding_idx``, ignores ``scale_grad_by_freq`` and has no table that all examples read together.
Nor does it notice examples that mix. So its gradients are not summed: they have to agree with those that are.
"""

from __future__ import annotations

import copy
import math
import warnings

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.bundles import Bundles
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.examples import Examples, count, device_of
from fed_dpsat.step.generators import Mark
from fed_dpsat.step.gradients import planned
from fed_dpsat.step.gradients.call import arguments
from fed_dpsat.step.gradients.contribution import Unplanned
from fed_dpsat.step.gradients.drawing import check_drawn
from fed_dpsat.step.gradients.loss import ModelLoss
from fed_dpsat.step.gradients.routes import routes_of
from fed_dpsat.step.query import At, LossFn, Query, simplified

TOLERANCE, SMALL = {"float32": 1e-3, "bfloat16": 5e-2}, 0.05
"""How far rows may be apart, over their norm, or over this share of the norm of the whole gradient if that is more."""


def opacus_sum(
    loss_fn: LossFn,
    at: At,
    inputs: Examples,
    targets: Examples,
    clipping: ClippingRule,
    bundles: Bundles | None = None,
    mode: str = "hooks",
) -> tuple[Params, int]:
    """Clipped sum over ``inputs[B, ...]``, ``B`` at least 1, and how many examples were not finite.

    ``mode`` is that of Opacus' ``GradSampleModule``: ``hooks``, ``ew`` or ``functorch``. Raises ``SettingError`` for a
    loss that is not a ``ModelLoss``, a query of more than one point, a module that Opacus does not take, and a
    parameter whose per-example gradients are not those of the planned engine.
    """
    point = simplified(at)
    if isinstance(point, Query):
        raise _refused(
            "for an optimizer that asks for more than one plain gradient (weighted points, a mask, a loss of its own)"
        )
    if not isinstance(loss_fn, ModelLoss):
        raise _refused("for a loss other than ModelLoss")
    _compare(loss_fn, point, inputs, targets, mode)
    return planned.planned_sum(loss_fn, point, inputs, targets, clipping, bundles)


def _refused(why: str) -> SettingError:
    return SettingError("engine", "opacus", why, "use 'auto' or 'vmap'")


def _compare(loss_fn: ModelLoss, params: Params, inputs: Examples, targets: Examples, mode: str) -> None:
    """Raise ``SettingError``, naming the layer, for gradients that differ."""
    name = type(loss_fn.module).__name__
    try:
        found = per_example(loss_fn, params, inputs, targets, mode)
        held = planned.per_example(loss_fn, params, inputs, targets, routes_of(loss_fn))
    except Unplanned as unplanned:
        raise _refused(f"for {name}: {unplanned}") from None
    except Exception as error:  # whatever Opacus says of a module that it does not take
        said = str(error).strip().splitlines()
        raise _refused(f"for {name}: {type(error).__name__}, {said[0] if said else 'no reason given'}") from error
    planned_rows = {n: held[n].rows() if n in held else torch.zeros_like(rows) for n, rows in found.items()}
    whole = torch.stack([_finite(rows).norm(dim=1) for rows in planned_rows.values()]).norm(dim=0)
    for parameter, rows in found.items():
        if not _near(rows, planned_rows[parameter], TOLERANCE[loss_fn.precision], whole):
            where = parameter.rpartition(".")[0]
            layer = f"{where or 'the module'} ({type(loss_fn.module.get_submodule(where)).__name__})"
            raise _refused(f"right for {layer}: its gradients of {parameter} are not those of each example alone")


def _near(rows: Tensor, expected: Tensor, tolerance: float, whole: Tensor) -> bool:
    """``whole`` are the norms of the gradients of all parameters: a small part of one is made of larger numbers."""
    if rows.shape != expected.shape:
        return False
    rows, expected = _finite(rows), _finite(expected)
    size = torch.maximum(expected.norm(dim=1), SMALL * torch.maximum(whole, whole.square().mean().sqrt()))
    return bool(((rows - expected).norm(dim=1) <= tolerance * size + math.sqrt(torch.finfo(rows.dtype).tiny)).all())


def _finite(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1).nan_to_num(0, 0, 0)


def per_example(loss_fn: ModelLoss, params: Params, inputs: Examples, targets: Examples, mode: str) -> Params:
    """Per-example gradients ``[B, *shape]`` by parameter; zeros where Opacus found none. Raises ``Undrawn``."""
    from opacus.grad_sample.utils import wrap_model  # type: ignore[import-untyped]  # seconds: imported when needed

    module = copy.deepcopy(loss_fn.module)
    for name, p in module.named_parameters():
        p.requires_grad_(name in params)
        if name in params:
            p.data = params[name].detach().clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        wrapped = wrap_model(module, grad_sample_mode=mode, loss_reduction="sum")
        mark = Mark.here(device_of(targets))
        args, by_name = arguments(inputs)
        total = loss_fn.criterion(wrapped(*args, **by_name), targets).sum()
        torch.autograd.backward(total)
        check_drawn(mark)
    named = dict(module.named_parameters())
    rows = {}
    for name, value in params.items():
        sample = getattr(named[name], "grad_sample", None)
        rows[name] = value.new_zeros(count(targets), *value.shape) if sample is None else sample.detach()
    return rows
