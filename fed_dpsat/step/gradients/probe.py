"""Whether a module is one that the planned engine is right for: asked once, with made-up examples.

Six things are looked at, on two and three examples: every operation keeps examples apart (``watch``), every layer's
input starts with the batch dimension, the gradient of one example's loss stays in that example's place, one example's
loss does not feel the others, it and its gradient are what they are for that example alone, wherever it stands among
however many, and no buffer changes. A pass that does something else than those (``course``) is not covered by them.
Parameters are random, since those of a run may be zeros that hide what they will show; so are whole numbers, within
what the module looks up.
What is asked depends on shapes only, never on data or parameters, so every process comes to the same answer.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fed_dpsat.params import Params
from fed_dpsat.step.draws import KEY_BYTES, Draws, of_batch
from fed_dpsat.step.generators import Mark, seed, training_on
from fed_dpsat.step.gradients.call import modules
from fed_dpsat.step.gradients.capture import Call, Capture, Tape, check_routed
from fed_dpsat.step.gradients.contribution import MAY_MIX, Unplanned
from fed_dpsat.step.gradients.conv import Convolution
from fed_dpsat.step.gradients.course import Course, Expected
from fed_dpsat.step.gradients.drawing import Drawing, Pass, check_drawn
from fed_dpsat.step.gradients.loss import ModelLoss
from fed_dpsat.step.gradients.made_up import Draw, made_up, made_up_parameters
from fed_dpsat.step.gradients.norm import GroupNorm
from fed_dpsat.step.gradients.routes import routes
from fed_dpsat.step.gradients.watch import Watch, check_backward

Key = tuple[object, ...]

POOLS = (functional.max_pool2d, functional.avg_pool2d, torch.max_pool2d)
"""Ten times slower where channels have planes."""


PLACES = ((0,), (1,), (2,), (1, 0), (2, 0, 1))
"""Which examples stand where, each alone first."""


@dataclass(frozen=True)
class Answer:
    """``refusal``: why not, or nothing; ``channels_last``: the memory format that suits the module's layers.

    ``apart``: whether examples are known to keep apart, be the module one for the planned engine or not, in passes
    that are as ``expected``.
    """

    refusal: str
    channels_last: bool = True
    apart: bool = False
    expected: Expected | None = None


_answers: weakref.WeakKeyDictionary[nn.Module, dict[Key, Answer]] = weakref.WeakKeyDictionary()


def refusal(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> str:
    """Why not, or nothing."""
    return ask(loss_fn, params, inputs, targets).refusal


def ask(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> Answer:
    """Whether, and in which format."""
    answers, key = _answers.setdefault(loss_fn.module, {}), key_of(loss_fn, params, inputs, targets)
    if key not in answers:
        answers[key] = _ask(loss_fn, params, inputs, targets)
    return answers[key]


def key_of(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> Key:
    """What an answer depends on, beside the module."""
    training = tuple(m.training for m in modules(loss_fn.module))
    batches = tuple((t.shape[1:], t.dtype, t.device) for t in (inputs, targets))
    return (*batches, tuple(params), training, loss_fn.criterion, loss_fn.precision, loss_fn.kernels)


def _ask(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> Answer:
    asked, loss_fn = loss_fn, replace(loss_fn, precision="float32")  # what mixes does so at any; rounding may hide it
    last, in_the_open, courses = True, "", []
    try:
        with training_on(inputs.device), _buffers_kept(loss_fn.module):
            drawn = made_up_parameters(loss_fn.module, params)
            draw = made_up(loss_fn, drawn, inputs, targets)
            constants: list[Tensor] | None = None
            for batch in (2, 3):
                with Draws(key=bytes(KEY_BYTES), ids=np.arange(batch)).used():
                    last, in_the_open, watch = _probe(loss_fn, drawn, params.keys(), draw, batch, constants)
                    constants = watch.constants
                    courses.append(watch.course if asked == loss_fn else course_of(asked, drawn, *draw(batch, 0)))
            if not (expected := Expected(*courses)).same:
                raise Unplanned(f"what it does depends on how many examples there are: {MAY_MIX}")
            _check_places(loss_fn, drawn, params.keys(), draw)
    except Unplanned as reason:
        return Answer(str(reason))
    except Exception as error:  # whatever a module or a criterion says about made-up examples
        return Answer(f"{type(error).__name__} on made-up examples: {str(error).splitlines()[0] if str(error) else ''}")
    return Answer(in_the_open, channels_last=last, apart=True, expected=expected)


def _probe(
    loss_fn: ModelLoss,
    params: Params,
    names: Collection[str],
    draw: Draw,
    batch: int,
    constants: list[Tensor] | None,
) -> tuple[bool, str, Watch]:
    """Whether channels are best last, which parameter no planned layer uses, and what was watched.

    Raises ``Unplanned`` for all else.
    """
    leaves = {name: p.detach().requires_grad_(name in names) for name, p in params.items()}
    tape, plan = Tape(keep_calls=True), routes(loss_fn.kernels)
    source, targets = draw(batch, 0)
    source.requires_grad_(source.is_floating_point())
    inputs = source.clone() if source.requires_grad else source  # a module may write into its input
    with torch.enable_grad():
        seed(inputs.device, 0)
        known = [*leaves.values(), *loss_fn.module.parameters(), *loss_fn.module.buffers()]
        capture, mark = Watch(tape, plan, inputs, targets, source, known, constants), Mark.here(inputs.device)
        with capture:
            losses = loss_fn(leaves, inputs, targets)
        if losses.shape != (batch,):
            raise Unplanned(f"losses of shape {tuple(losses.shape)} for {batch} examples")
        if not capture.saw(losses):
            raise Unplanned(f"losses that were made of the batch out of sight: {MAY_MIX}")
        if not bool(losses.isfinite().all()):
            raise Unplanned("losses of made-up examples that are not finite")
        direct = _check_gradients(losses, tape, [capture.anchor, *(leaves[name] for name in names)])
        check_drawn(mark)
        others, other_targets = draw(batch, 1)
        others[1], other_targets[1] = source.detach()[1], targets[1]
        seed(inputs.device, 0)
        with Capture(Tape(), plan, batch):
            again = loss_fn(leaves, others, other_targets)
    if not torch.allclose(losses[1], again[1], rtol=1e-3, atol=1e-4, equal_nan=True):
        raise Unplanned(f"the loss of one example depends on the others: {MAY_MIX}")
    try:
        check_routed({name: leaves[name] for name in names}, direct[1:])
    except Unplanned as reason:
        return True, str(reason), capture
    return _suits_channels_last(tape.calls, capture.functions), "", capture


def course_of(loss_fn: ModelLoss, params: Params, inputs: Tensor, targets: Tensor) -> Course:
    """Of one pass forward."""
    capture = Capture(Tape(), routes(loss_fn.kernels), len(inputs))
    with torch.enable_grad(), capture:  # as in training: a module sees whether gradients are on
        loss_fn(params, inputs, targets)
    return capture.course


def _check_places(loss_fn: ModelLoss, params: Params, names: Collection[str], draw: Draw) -> None:
    """``Unplanned`` unless an example's loss and gradient are what they are for it alone, wherever it stands."""
    leaves = {name: p.detach().requires_grad_(name in names) for name, p in params.items()}
    wanted, (inputs, targets) = [leaves[name] for name in names], draw(max(map(len, PLACES)), 2)
    alone: dict[int, tuple[Tensor, Tensor]] = {}
    for order in PLACES:
        ids = np.array(order)
        with torch.enable_grad(), Draws(key=bytes(KEY_BYTES), ids=ids).used():
            seed(inputs.device, 0)
            with Drawing(Pass(of_batch(len(order)))):
                losses = loss_fn(leaves, inputs[list(order)], targets[list(order)])
        for place, example in enumerate(order):
            loss = losses[place]
            found = loss.detach(), _gradient(loss, wanted)
            first = alone.setdefault(example, found)
            away = (found[1] - first[1]).norm()
            if not torch.allclose(found[0], first[0], 1e-3, 1e-4) or not away <= 1e-3 * first[1].norm() + 1e-5:
                raise Unplanned(f"the loss of an example depends on its place or on how many there are: {MAY_MIX}")


def _gradient(loss: Tensor, wanted: list[Tensor]) -> Tensor:
    """In one row."""
    if not loss.requires_grad or not wanted:
        return torch.zeros(1)
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in found])


def _check_gradients(losses: Tensor, tape: Tape, wanted: list[Tensor]) -> list[Tensor | None]:
    """``Unplanned`` unless a gradient of an example's loss, of any size, stays in its row; those to ``wanted``."""
    direct: list[Tensor | None] = [None] * len(wanted)
    if not losses.requires_grad:
        return direct
    check_backward(losses)
    sizes = torch.randn(len(losses), generator=torch.Generator().manual_seed(0)).to(losses)
    for row in range(2) if len(losses) == 2 else [len(losses) - 1]:
        tape.gradients.clear()
        found = torch.autograd.grad(losses[row], wanted, sizes[row], retain_graph=True, allow_unused=True)
        direct = [one if one is not None else other for one, other in zip(found, direct, strict=True)]
        for grad in tape.gradients:
            if bool(grad[[i for i in range(len(losses)) if i != row]].any()):
                raise Unplanned(f"a gradient leaves the place of its example in the batch: {MAY_MIX}")
    return direct


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """``Unplanned`` if a buffer of ``module`` changes; all are as they were before, whatever happens."""
    before = [(name, b, b._version, b.detach().clone()) for name, b in module.named_buffers()]
    try:
        yield
        now = dict(module.named_buffers())
        for name, buffer, version, _ in before:
            if now.get(name) is not buffer or buffer._version != version:
                raise Unplanned(f"a forward pass changes the buffer {name}: {MAY_MIX}")
    finally:
        for name, buffer, version, kept in before:
            path, _, key = name.rpartition(".")
            module.get_submodule(path)._buffers[key] = buffer
            if buffer._version != version:
                buffer.detach().copy_(kept)


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
