"""Conformance of models: examples do not mix, and per-example gradients equal those of single examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map

from fed_dpsat.errors import ModelError
from fed_dpsat.params import Params, global_norm, subtract, trainable, zeros_like
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.examples import Examples, count, some
from fed_dpsat.step.gradients.call import call
from fed_dpsat.step.gradients.loss import logits_of
from fed_dpsat.step.gradients.per_example import Engine, ModelLoss, check_module, clipped_gradient_sum
from fed_dpsat.step.gradients.unchanging import check_unchanging
from fed_dpsat.tasks.base import Task
from fed_dpsat.tasks.classification import Classification
from fed_dpsat.testing.conformance import require, run_checks
from fed_dpsat.testing.problems import copied, difference

DROPOUT = _DropoutNd
BATCH = 4
CLIP_NORM = 0.01
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Subject:
    """``make()`` gives the module for ``inputs[B, ...]``; ``engine`` computes per-example gradients.

    ``others[B, ...]`` have the same first example, beside other ones.
    """

    make: Callable[[], nn.Module]
    task: Task
    engine: str | Engine
    inputs: Examples
    others: Examples
    targets: Examples

    @property
    def batch(self) -> int:
        """Its number of examples."""
        return count(self.inputs)


def check_model(
    factory: Callable[[], nn.Module],
    *,
    input_shape: tuple[int, ...] = (),
    inputs: Examples = None,
    targets: Examples = None,
    task: Task | None = None,
    num_classes: int = 10,
    engine: str | Engine = "auto",
) -> list[str]:
    """Run the suite on ``() -> module``; returns the check names.

    The module maps ``x[B, *input_shape]``, normal numbers, to ``[B, num_classes]``. Or give a batch of your own as
    ``inputs``: a tensor or a tree of tensors ``[B, ...]`` of two examples or more that differ, such as tokens and their
    mask. ``task`` gives the loss and the shape of the outputs of another task than classes, for ``targets[B, ...]``.
    ``engine`` is a name in ``ENGINES``, or your own engine. Raises ``ConformanceError``, and ``ValueError`` for a batch
    of fewer than two examples, and for a task without targets.
    """
    if inputs is None:
        inputs = torch.randn((BATCH, *input_shape), generator=torch.Generator().manual_seed(0))
        others: Examples = torch.cat([inputs[:1], 10 * inputs[1:].flip(0) + 3])
    elif (size := count(inputs)) < 2:
        raise ValueError(f"inputs of {size} examples: give at least two that differ, or no other example could mix in")
    else:
        others = tree_map(lambda t: t[:1].expand_as(t).clone(), inputs)
    if targets is None:
        if task is not None:
            raise ValueError(f"task {task.name} without targets: give targets[B, ...] as the task has them")
        targets = torch.arange(count(inputs)) % num_classes
    subject = Subject(
        make=factory,
        task=task or _Classes(num_classes),
        engine=engine,
        inputs=inputs,
        others=others,
        targets=targets,
    )
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
    """``x[B, ...]`` has outputs of the shape that the task takes, for B = 1 too."""
    for batch in (1, subject.batch):
        logits = _logits(subject.make(), some(subject.inputs, slice(batch)))
        require(
            subject.task.fits(logits, batch),
            expected=f"outputs of shape {subject.task.expected(batch)}",
            seen=str(list(logits.shape)),
            remedy="keep the batch dimension first, and the outputs that the task has, such as one logit per class",
        )


def logits_ignore_the_other_examples(subject: Subject) -> None:
    """The logits of an example do not change with the other examples of the batch, in training mode."""
    module = subject.make().train()
    rows = []
    for batch in (subject.inputs, subject.others):
        torch.manual_seed(0)  # equal dropout masks
        rows.append(_logits(module, batch)[0].detach())
    away = float((rows[0] - rows[1]).abs().max())
    require(
        away <= TOLERANCE * (1 + float(rows[0].abs().max())),
        expected="logits of the first example that do not depend on the others",
        seen=f"a change of {away:.3g}",
        remedy="use no statistics over the batch: GroupNorm or LayerNorm instead of BatchNorm, no attention across it",
    )


def forward_changes_nothing(subject: Subject) -> None:
    """A forward pass changes neither its input nor the module: parameters, buffers and other state."""
    module, inputs = subject.make().train(), tree_map(torch.clone, subject.inputs)
    leaves = dict(zip(_names(inputs), tree_leaves(inputs), strict=True))
    before = copied(leaves)
    call(module, {}, inputs)
    said = difference(before, leaves)
    remedy = "an operation in place on the input changes the data"
    try:
        check_unchanging(subject.make(), subject.inputs, subject.others)
    except ModelError as error:
        said, _, remedy = str(error).partition("; ")
    require(not said, expected="an unchanged input and module after a forward pass", seen=said, remedy=remedy)


def gradients_are_those_of_single_examples(subject: Subject) -> None:
    """The clipped sum of the engine equals the sum over examples that plain autograd clips one by one."""
    module = subject.make().train().double()  # no activation within rounding of its kink
    for layer in module.modules():
        if isinstance(layer, DROPOUT):
            layer.eval()
    inputs, targets = tree_map(lambda t: t.double() if t.is_floating_point() else t, subject.inputs), subject.targets
    loss, params, rule = ModelLoss(module, subject.task.loss), trainable(module), FlatClipping(clip_norm=CLIP_NORM)
    if _draws(module, inputs):  # in a function, without a layer
        module.eval()
    one_by_one = zeros_like(params)
    for i in range(subject.batch):
        one = slice(i, i + 1)
        gradient = _gradient(loss, params, tree_map(torch.clone, some(inputs, one)), some(targets, one))
        scale = min(1.0, CLIP_NORM / max(float(global_norm(gradient)), 1e-30))
        one_by_one = {name: total + scale * gradient[name] for name, total in one_by_one.items()}
    if callable(subject.engine):
        found, _ = subject.engine(loss, params, tree_map(torch.clone, inputs), targets, rule)
    else:
        batch = tree_map(torch.clone, inputs), targets
        found, _ = clipped_gradient_sum(loss, params, batch, rule, engine=subject.engine)
    away = float(global_norm(subtract(found, one_by_one)))
    require(
        away <= TOLERANCE * subject.batch * CLIP_NORM,
        expected=f"the sum over {subject.batch} single examples, each clipped to {CLIP_NORM}",
        seen=f"a sum {away / (subject.batch * CLIP_NORM):.3g} of its bound away with engine {_name(subject.engine)}",
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


class _Classes(Classification):
    """No more outputs than classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(tuple(map(str, range(num_classes))))

    def fits(self, outputs: Tensor, count: int) -> bool:
        return outputs.shape == (count, self.outputs)


def _logits(module: nn.Module, inputs: Examples) -> Tensor:
    """Of copies of ``inputs[B, ...]``."""
    return logits_of(call(module, {}, tree_map(torch.clone, inputs)))


def _names(inputs: Examples) -> list[str]:
    """Of the leaves, in an error."""
    if isinstance(inputs, dict) and all(isinstance(value, Tensor) for value in inputs.values()):
        return [f"the input {name!r}" for name in inputs]
    return [f"the input {i}" if i else "the input" for i, _ in enumerate(tree_leaves(inputs))]


def _draws(module: nn.Module, inputs: Examples) -> bool:
    """Whether outputs depend on the generator."""
    rows = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        rows.append(_logits(module, inputs).detach())
    return not torch.allclose(rows[0], rows[1])


def _gradient(loss: ModelLoss, params: Params, inputs: Examples, targets: Examples) -> Params:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    total = loss(leaves, inputs, targets).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), found, strict=True)}


def _name(engine: str | Engine) -> str:
    return engine if isinstance(engine, str) else getattr(engine, "__name__", type(engine).__name__)
