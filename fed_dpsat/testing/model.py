"""Conformance of models: examples do not mix, and per-example gradients equal those of single examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fed_dpsat.errors import ModelError
from fed_dpsat.params import Params, global_norm, subtract, trainable, zeros_like
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import Engine, ModelLoss, check_module, clipped_gradient_sum
from fed_dpsat.step.gradients.unchanging import check_unchanging
from fed_dpsat.testing.conformance import require, run_checks
from fed_dpsat.testing.problems import copied, difference

DROPOUT = _DropoutNd
BATCH = 4
CLIP_NORM = 0.01
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Subject:
    """``make()`` gives the module for ``x[B, *input_shape]``; ``engine`` computes per-example gradients.

    ``inputs`` are ``BATCH`` examples, and ``others`` replace all but the first of them. ``probe`` and 1 - ``probe`` are
    valid inputs too.
    """

    make: Callable[[], nn.Module]
    num_classes: int
    engine: str | Engine
    inputs: Tensor
    others: Tensor
    probe: Tensor


def check_model(
    factory: Callable[[], nn.Module],
    *,
    input_shape: tuple[int, ...],
    num_classes: int = 10,
    engine: str | Engine = "auto",
    tokens: int = 0,
) -> list[str]:
    """Run the suite on ``() -> module`` from ``x[B, *input_shape]`` to ``[B, num_classes]``; returns the check names.

    ``engine`` is a name in ``ENGINES``, or your own engine. Inputs are normal numbers; for a model of texts they are
    token numbers below ``tokens``. Raises ``ConformanceError``.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, *input_shape)
    if tokens:
        inputs, others = (torch.randint(0, tokens, shape, generator=generator).float() for _ in range(2))
        others, probe = others[1:], inputs % 2
    else:
        inputs = probe = torch.randn(shape, generator=generator)
        others = 10 * inputs[1:].flip(0) + 3
    subject = Subject(make=factory, num_classes=num_classes, engine=engine, inputs=inputs, others=others, probe=probe)
    return run_checks("model", CHECKS, subject)


def layers_share_no_statistics(subject: Subject) -> None:
    """No known layer mixes the examples of a batch, as BatchNorm does."""
    module = subject.make()
    try:
        check_module(module)
    except ModelError as error:
        seen, _, remedy = str(error).partition("; ")
        require(False, expected="layers that keep examples apart", seen=seen, remedy=remedy)


def logits_are_one_row_per_example(subject: Subject) -> None:
    """``x[B, *input_shape] -> logits[B, num_classes]``, for B = 1 too."""
    for batch in (1, BATCH):
        logits = subject.make()(subject.inputs[:batch].clone())
        require(
            tuple(logits.shape) == (batch, subject.num_classes),
            expected=f"logits of shape ({batch}, {subject.num_classes})",
            seen=str(tuple(logits.shape)),
            remedy="keep the batch dimension first, and one logit per class",
        )


def logits_ignore_the_other_examples(subject: Subject) -> None:
    """The logits of an example do not change with the other examples of the batch, in training mode."""
    module = subject.make().train()
    rows = []
    for batch in (subject.inputs, torch.cat([subject.inputs[:1], subject.others])):
        torch.manual_seed(0)  # equal dropout masks
        rows.append(module(batch.clone())[0].detach())
    away = float((rows[0] - rows[1]).abs().max())
    require(
        away <= TOLERANCE * (1 + float(rows[0].abs().max())),
        expected="logits of the first example that do not depend on the others",
        seen=f"a change of {away:.3g}",
        remedy="use no statistics over the batch: GroupNorm or LayerNorm instead of BatchNorm, no attention across it",
    )


def forward_changes_nothing(subject: Subject) -> None:
    """A forward pass changes neither its input nor the module: parameters, buffers and other state."""
    module, inputs = subject.make().train(), subject.inputs.clone()
    before = copied({"the input": inputs})
    module(inputs)
    said = difference(before, {"the input": inputs})
    remedy = "an operation in place on the input changes the data"
    try:
        check_unchanging(subject.make(), subject.probe, 1 - subject.probe)
    except ModelError as error:
        said, _, remedy = str(error).partition("; ")
    require(not said, expected="an unchanged input and module after a forward pass", seen=said, remedy=remedy)


def gradients_are_those_of_single_examples(subject: Subject) -> None:
    """The clipped sum of the engine equals the sum over examples that plain autograd clips one by one."""
    module = subject.make().train().double()  # no activation within rounding of its kink
    for layer in module.modules():
        if isinstance(layer, DROPOUT):
            layer.eval()
    loss, params, rule = ModelLoss(module), trainable(module), FlatClipping(clip_norm=CLIP_NORM)
    if _draws(module, subject.inputs.double()):  # in a function, without a layer
        module.eval()
    inputs, targets = subject.inputs.double(), torch.arange(BATCH) % subject.num_classes
    one_by_one = zeros_like(params)
    for x, y in zip(torch.split(inputs, 1), torch.split(targets, 1), strict=True):
        gradient = _gradient(loss, params, x.clone(), y)
        scale = min(1.0, CLIP_NORM / max(float(global_norm(gradient)), 1e-30))
        one_by_one = {name: total + scale * gradient[name] for name, total in one_by_one.items()}
    if callable(subject.engine):
        found, _ = subject.engine(loss, params, inputs.clone(), targets, rule)
    else:
        found, _ = clipped_gradient_sum(loss, params, (inputs.clone(), targets), rule, engine=subject.engine)
    away = float(global_norm(subtract(found, one_by_one)))
    require(
        away <= TOLERANCE * BATCH * CLIP_NORM,
        expected=f"the sum over {BATCH} single examples, each clipped to {CLIP_NORM}",
        seen=f"a sum {away / (BATCH * CLIP_NORM):.3g} of its bound away with engine {_name(subject.engine)}",
        remedy="an in-place activation (inplace=True) overwrites tensors of hooks, a layer used twice counts twice: "
        "try engine='vmap'",
    )


CHECKS = (
    layers_share_no_statistics,
    logits_are_one_row_per_example,
    forward_changes_nothing,
    logits_ignore_the_other_examples,
    gradients_are_those_of_single_examples,
)


def _draws(module: nn.Module, inputs: Tensor) -> bool:
    """Whether outputs depend on the generator."""
    rows = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        rows.append(module(inputs.clone()).detach())
    return not torch.allclose(*rows)


def _gradient(loss: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> Params:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    total = loss(leaves, inputs, targets).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), found, strict=True)}


def _name(engine: str | Engine) -> str:
    return engine if isinstance(engine, str) else getattr(engine, "__name__", type(engine).__name__)
