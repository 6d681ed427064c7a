"""Whether a module is one that the planned engine is right for: asked once, with made-up examples.

Four things are looked at, on two and three examples: every operation keeps examples apart (``watch``), every layer's
input starts with the batch dimension, the gradient of one example's loss stays in that example's place, and one
example's loss does not feel the others.
What is asked depends on shapes and parameters only, never on data, so every process comes to the same answer.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fed_dpsat.draws import KEY_BYTES, Draws
from fed_dpsat.engines.call import modules
from fed_dpsat.engines.capture import Call, Capture, Tape, check_routed
from fed_dpsat.engines.contribution import MAY_MIX, Unplanned
from fed_dpsat.engines.conv import Convolution
from fed_dpsat.engines.drawing import check_drawn
from fed_dpsat.engines.loss import ModelLoss
from fed_dpsat.engines.norm import GroupNorm
from fed_dpsat.engines.routes import routes
from fed_dpsat.engines.watch import Watch
from fed_dpsat.generators import Mark, seed, training_on
from fed_dpsat.params import Params

Key = tuple[object, ...]

POOLS = (functional.max_pool2d, functional.avg_pool2d, torch.max_pool2d)
"""Ten times slower where channels have planes."""


@dataclass(frozen=True)
class Answer:
    """``refusal``: why not, or nothing; ``channels_last``: the memory format that suits the module's layers."""

    refusal: str
    channels_last: bool = True


_answers: weakref.WeakKeyDictionary[nn.Module, dict[Key, Answer]] = weakref.WeakKeyDictionary()


def refusal(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> str:
    """Why not, or nothing."""
    return ask(loss_fn, params, inputs, targets).refusal


def ask(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> Answer:
    """Whether, and in which format."""
    answers = _answers.setdefault(loss_fn.module, {})
    training = tuple(m.training for m in modules(loss_fn.module))
    batches = tuple((t.shape[1:], t.dtype, t.device) for t in (inputs, targets))
    key = (*batches, tuple(params), training, loss_fn.criterion, loss_fn.kernels)
    if key not in answers:
        answers[key] = _ask(loss_fn, params, inputs, targets)
    return answers[key]


def _ask(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> Answer:
    loss_fn = replace(loss_fn, precision="float32")  # what mixes does so at any precision; rounding must not hide it
    last = True
    try:
        for batch in (2, 3):
            with training_on(inputs.device), Draws(key=bytes(KEY_BYTES), ids=np.arange(batch)).used():
                last = _probe(loss_fn, params, _made_up(inputs, batch, 0), _made_up(targets, batch, 0) * 0)
    except Unplanned as reason:
        return Answer(str(reason))
    except Exception as error:  # whatever a module or a criterion says about made-up examples
        return Answer(f"{type(error).__name__} on made-up examples: {str(error).splitlines()[0] if str(error) else ''}")
    return Answer("", channels_last=last)


def _probe(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> bool:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    tape, plan = Tape(keep_calls=True), routes(loss_fn.kernels)
    with torch.enable_grad():
        seed(inputs.device, 0)
        capture, mark = Watch(tape, plan, inputs, targets), Mark.here(inputs.device)
        with capture:
            losses = loss_fn(leaves, inputs, targets)
        if losses.shape != (len(inputs),):
            raise Unplanned(f"losses of shape {tuple(losses.shape)} for {len(inputs)} examples")
        if not losses.requires_grad:
            check_drawn(mark)
            return True
        wanted = [capture.anchor, *leaves.values()]
        direct = torch.autograd.grad(losses[1], wanted, allow_unused=True)
        check_drawn(mark)
        check_routed(leaves, direct[1:])
        for grad in tape.gradients:
            if bool(grad[[i for i in range(len(inputs)) if i != 1]].any()):
                raise Unplanned(f"a gradient leaves the place of its example in the batch: {MAY_MIX}")
        others = _made_up(inputs, len(inputs), 1)
        others[1] = inputs[1]
        seed(inputs.device, 0)
        with Capture(Tape(), plan, len(inputs)):
            again = loss_fn(leaves, others, targets)
    if not torch.allclose(losses[1], again[1], rtol=1e-3, atol=1e-4, equal_nan=True):
        raise Unplanned(f"the loss of one example depends on the others: {MAY_MIX}")
    return _suits_channels_last(tape.calls, capture.functions)


def _suits_channels_last(calls: list[Call], functions: set[object]) -> bool:
    """By a count of what either format costs beyond the other, per example, in nanoseconds of one core.

    Where channels have planes, convolutions are slower by a few percent, pools and groups by a factor; channels last,
    examples have to be copied to lie side by side, and normalisation is slower; but not by kernels of our own.
    """
    if any(pool in functions for pool in POOLS):
        return True
    if any(getattr(call.layer, "strategy", "") == "compiled" for call in calls):
        return True
    planes = last = 0.0
    for call in (call for call in calls if call.x.ndim == 4):
        values = call.x[0].numel()
        if isinstance(call.layer, Convolution):
            geometry = call.layer.geometry
            if geometry.groups > 1:
                return True
            positions = math.prod(geometry.positions(tuple(call.x.shape[2:])))
            planes += 0.0032 * positions * math.prod(geometry.shape)
            last += 0.3 * (values + positions * geometry.shape[0]) * (call.layer.strategy == "channels")
        elif isinstance(call.layer, GroupNorm):
            last += 0.5 * values
    return last <= planes


def _made_up(like: Tensor, batch: int, drawn: int) -> Tensor:
    """``[batch, *like.shape[1:]]``: small numbers, or zeros where only whole numbers fit."""
    shape = batch, *like.shape[1:]
    if not like.is_floating_point():
        return like.new_zeros(shape)
    generator = torch.Generator().manual_seed(drawn)
    return torch.randn(shape, generator=generator).to(like)
