"""The hooks of Opacus behind the interface of the engines: slow, familiar, a cross-check.

Its layers are not torch's in every setting, and it says so in few: 1.6 pads with zeros whatever ``padding_mode`` is,
trains the row of ``padding_idx``, ignores ``scale_grad_by_freq`` and has no table that all examples read together.
So before a module is trained with it, its gradients of made-up examples are compared with those of autograd.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fed_dpsat.errors import ModelError, SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.draws import KEY_BYTES, Draws, of_batch
from fed_dpsat.step.generators import Mark, training_on
from fed_dpsat.step.gradients.call import modules
from fed_dpsat.step.gradients.drawing import Drawing, Pass, Undrawn, check_drawn
from fed_dpsat.step.gradients.finite import finite_factors, keep, squared_norm_rows
from fed_dpsat.step.gradients.loss import ModelLoss
from fed_dpsat.step.gradients.made_up import made_up, made_up_parameters
from fed_dpsat.step.gradients.probe import Key, ask, course_of, key_of
from fed_dpsat.step.query import At, LossFn, Query, simplified

BATCH, KEY = 3, bytes(KEY_BYTES)

_found: weakref.WeakKeyDictionary[nn.Module, dict[Key, str]] = weakref.WeakKeyDictionary()


def opacus_sum(
    loss_fn: LossFn, at: At, inputs: Tensor, targets: Tensor, clipping: ClippingRule, mode: str = "hooks"
) -> tuple[Params, int]:
    """Clipped sum over ``inputs[B, ...]``, ``B`` at least 1, and how many examples were not finite.

    ``mode`` is that of Opacus' ``GradSampleModule``: ``hooks``, ``ew`` or ``functorch``. Raises ``SettingError``
    for a loss that is not a ``ModelLoss``, a query of more than one point, and a layer whose gradients are not those of
    autograd; ``ModelError`` for a module whose examples may mix: hooks would not notice.
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
    _compare_once(loss_fn, params, inputs, targets, mode)
    if not (answer := ask(loss_fn, params, inputs, targets)).apart:
        raise ModelError(f"engine='opacus' cannot train {type(loss_fn.module).__name__}: {answer.refusal}; use 'auto'")
    if answer.expected and not answer.expected.holds(course_of(loss_fn, params, inputs, targets), len(inputs)):
        raise ModelError(
            f"engine='opacus' cannot train {type(loss_fn.module).__name__}: what it does depends on the number of "
            "examples or on values of parameters; use 'auto'"
        )
    rows = per_example(loss_fn, params, inputs, targets, mode)
    factors, finite, num_nonfinite = finite_factors({n: squared_norm_rows(g) for n, g in rows.items()}, clipping)
    total = {
        name: (factors[name].to(g) @ keep(g, finite).reshape(len(g), -1)).view(g.shape[1:]) for name, g in rows.items()
    }
    return total, num_nonfinite


def _compare_once(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor, mode: str) -> None:
    """Raise what ``_compare`` says of this module and examples of this kind."""
    found, key = _found.setdefault(loss_fn.module, {}), (mode, *key_of(loss_fn, params, inputs, targets))
    if key not in found:
        with training_on(inputs.device):
            found[key] = _compare(loss_fn, params, inputs, targets, mode)
    if found[key]:
        raise SettingError("engine", "opacus", found[key], "use 'auto' or 'vmap'")


def _compare(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor, mode: str) -> str:
    """Which layer has other gradients than autograd gives example by example, on made-up ones; nothing if none has."""
    trained = {name: p.detach() for name, p in params.items()}
    try:
        return _compare_in(torch.float64, 1e-6, loss_fn, trained, inputs, targets, mode)
    except RuntimeError:  # a module that asks for the types it has
        dtype = next((p.dtype for p in trained.values()), torch.float32)
        return _compare_in(dtype, 1e-3, loss_fn, trained, inputs, targets, mode)


def _compare_in(
    dtype: torch.dtype, tolerance: float, loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor, mode: str
) -> str:
    module = copy.deepcopy(loss_fn.module).to(dtype)
    loss = replace(loss_fn, module=module, precision="float32")
    inputs, targets = (t.to(dtype) if t.is_floating_point() else t for t in (inputs, targets))
    random = made_up_parameters(module, {name: p.to(dtype) for name, p in params.items()})
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(random[name])
    params = {name: random[name] for name in params}
    draw = made_up(loss, params, inputs, targets)
    for number in range(2):
        x, y = draw(BATCH, number)
        if number and not x.is_floating_point():
            x = _few_words(module, x)
        try:
            expected = _one_by_one(loss, params, x, y)
        except Undrawn as undrawn:
            return f"for {type(module).__name__}: {undrawn}"
        try:
            with Draws(key=KEY, ids=np.arange(BATCH)).used():
                found = per_example(loss, params, x.clone(), y, mode)
        except Exception as error:  # whatever Opacus says of a module that it does not take
            said = str(error).strip().splitlines()
            return f"for {type(module).__name__}: {type(error).__name__}, {said[0] if said else 'no reason given'}"
        for name, rows in expected.items():
            same = rows.shape == found[name].shape
            away = float((found[name] - rows).norm() / rows.norm().clamp(min=1e-30)) if same else math.inf
            if not away <= tolerance:
                where = name.rpartition(".")[0]
                layer = f"{where or 'the module'} ({type(module.get_submodule(where)).__name__})"
                return f"right for {layer}: its gradients of {name} are not those of autograd on made-up examples"
    return ""


def _one_by_one(loss: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> Params:
    """``[B, *shape]`` by autograd, each example alone with draws of its own; raises ``Undrawn``."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    rows = []
    with torch.enable_grad():
        for i in range(len(inputs)):
            with Draws(key=KEY, ids=np.array([i])).used(), Drawing(Pass(of_batch(1))):
                one = loss(leaves, inputs[i : i + 1].clone(), targets[i : i + 1])[0]
            rows.append(torch.autograd.grad(one, list(leaves.values()), materialize_grads=True))
    return {name: torch.stack(each) for name, each in zip(leaves, zip(*rows, strict=True), strict=True)}


def _few_words(module: nn.Module, words: Tensor) -> Tensor:
    """``words``, but of a few that come often, those that pad among them."""
    pads = {getattr(m, "padding_idx", None) for m in modules(module)} - {None}
    few = words.new_tensor([*sorted(pads), 0, int(words.max())])  # type: ignore[type-var]
    return few[words % len(few)]


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
