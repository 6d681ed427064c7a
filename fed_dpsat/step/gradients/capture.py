"""The forward pass, in which no two examples meet and every layer that holds parameters keeps what its sum needs.

The pass runs within a ``Level``: a module sees one example. A torch function mode sees each call that it makes, of
whatever class it is, and answers it by the first of these that fits:

====================================================== =========================================================
a call                                                 is answered
====================================================== =========================================================
what torch writes in Python around layers              call by call (attention, ``gumbel_softmax``)
a layer of the ``plan`` whose weight is a function      by the ``Layer``, for the whole batch; contributions go to
of parameters alone                                    the tape
a parameter, or a function of parameters, beside       with a row of it for each example; the gradient of a row is
tensors of the batch (a class token, a scale)          that example's
a loss or attention on the whole batch (``ROWWISE``)   for the whole batch: torch's own kernels, which have no
                                                       rule for ``vmap`` or a slow one
a draw                                                 with the examples' own random numbers (``drawing``)
any other                                              by torch, example by example
====================================================== =========================================================

So parameters never enter the graph of the loss; one that does was used in a way that no call shows (a scripted module).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional
from torch.overrides import _pop_mode, _push_mode
from torch.utils._pytree import tree_map

from fed_dpsat.params import Params
from fed_dpsat.step.bundles import Bundles
from fed_dpsat.step.draws import of_batch
from fed_dpsat.step.examples import Examples
from fed_dpsat.step.gradients import embedding, rnn
from fed_dpsat.step.gradients.contribution import (
    Contribution,
    Rows,
    Unplanned,
    bundled,
    check_versions,
    versions,
    wide,
)
from fed_dpsat.step.gradients.drawing import ANSWERS, LOOKED_INTO, Pass
from fed_dpsat.step.gradients.level import Level
from fed_dpsat.step.gradients.passes import InPass, check_backward, name_of, tensors, writes
from fed_dpsat.step.gradients.rowwise import ROWWISE
from fed_dpsat.step.gradients.skipped import ask_no_batch
from fed_dpsat.step.placement import is_card
from fed_dpsat.step.query import LossFn

INSTEAD: dict[Callable[..., Any], Callable[..., Any]] = {**LOOKED_INTO, functional.embedding_bag: embedding.bag}
"""What torch writes around layers, in calls that have answers."""

NARROW = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
"""Layers that compute in the dtype of ``torch.autocast``, where that is on; contributions are in float32 even so."""

OF_BATCHES = frozenset({functional.group_norm, functional.instance_norm})
"""Layers whose first dimension is always that of a batch: an example is one row of it, or there is no layer."""

OF_MATRICES = frozenset({torch.mm, Tensor.mm})
"""Products of an example that are no matrices for the whole batch."""

REQUIRES_GRAD, GRAD_FN, IS_LEAF = (getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf"))
OF_GRAPHS = frozenset({REQUIRES_GRAD, GRAD_FN, IS_LEAF})

HOOKS = "a module that packs saved tensors itself (checkpoint, saved_tensors_hooks)"


class Layer(Protocol):
    """One call with parameters: its forward pass, and a backward pass that keeps per-example contributions."""

    def forward(self, x: Tensor, weight: Any, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what ``backward`` needs of the input."""

    def backward(
        self, grad: Tensor, weight: Any, saved: tuple[Tensor, ...], need_input: bool, roles: tuple[str, ...]
    ) -> tuple[Tensor | None, dict[str, Contribution]]:
        """Gradient of the input, and contributions by role: ``weight``, ``bias``."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a module asked for: a layer, its input, and the tensors that lead to parameters."""

    name: str
    layer: Layer
    x: Any
    weight: Tensor | None
    bias: Tensor | None


Route = Callable[..., Call | None]
"""A function's arguments, with its input ``x[B, *]`` for all examples, to a ``Call``; None for another way."""


@dataclass
class Tape:
    """Contributions in the order of the backward pass, with the tensor that each is to; ``calls`` forward.

    ``opened`` are the tensors that were used in the open, with the name of the function. With ``bundles`` contributions
    are those of bundles, whose rows have their weights in the losses.
    """

    calls: list[Call] = field(default_factory=list)
    found: list[tuple[Tensor, Contribution]] = field(default_factory=list)
    keep_calls: bool = False
    opened: list[tuple[Tensor, str]] = field(default_factory=list)
    bundles: Bundles | None = None

    def add(self, to: Tensor, held: Any) -> None:
        """A contribution of the examples to a tensor."""
        self.found.append((to, held if self.bundles is None else bundled(held, self.bundles.rows)))


class Capture(InPass):
    """One pass over ``batch`` examples on ``tape``, or, without one, with parameters in the graph of the loss.

    If nothing ``learns``, layers compute as they do for a backward pass, and leave none.

    Raises ``Unplanned``, or ``RuntimeError`` where ``vmap`` refuses something.
    """

    def __init__(
        self, batch: int, plan: Mapping[Callable[..., Any], Route], tape: Tape | None = None, learns: bool = True
    ) -> None:
        super().__init__()
        self._level = Level(batch)
        self.drawn = Pass(of_batch(batch), self._level)
        self._tape, self._plan = tape, plan
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self.anchor = torch.zeros((), requires_grad=learns)
        self.functions: set[object] = set()

    def losses(self, loss_fn: LossFn, params: Params, inputs: Examples, targets: Examples) -> Tensor:
        """``[B]``, those of ``inputs[B, ...], targets[B, ...]``; raises ``Unplanned`` if an example has not one."""
        losses = self.each(lambda x, y: loss_fn(params, x, y), inputs, targets)
        if losses.shape != (self._level.batch,):
            raise Unplanned(f"losses of shape {(1, *losses.shape[1:])} for one example")
        return losses

    def each(self, function: Callable[..., Tensor], *wholes: Any) -> Tensor:
        """``function`` of each example of ``wholes``, trees of ``[B, ...]``, as a batch of one: ``[B, ...]``."""
        ask_no_batch()
        with self._level.opened(), disable_saved_tensors_hooks(HOOKS), self:
            out = function(*map(self._alone, wholes))
            self.check_own(out, function)
            if self.raised:
                raise Unplanned(f"an error of {self.raised} that the module catches")
            whole = self._level.whole(out)
            return whole.squeeze(1) if out.ndim and len(out) == 1 else whole

    def _alone(self, whole: Any) -> Any:
        """``[1, ...]``, a batch of each example, of all tensors ``[B, ...]`` in ``whole``."""

        def alone(t: Tensor) -> Tensor:
            one: Tensor = self.made(self._level.wrap(t.unsqueeze(1)))
            return one

        return alone(whole) if isinstance(whole, Tensor) else tree_map(alone, whole)

    def is_own(self, t: Tensor) -> bool:
        """What is the same for all examples may be kept."""
        return self._level.wraps(t)

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]
    ) -> Any:
        """The answer to one call of the module."""
        self.functions.add(func)
        if func in INSTEAD:
            with self:
                return INSTEAD[func](*args, **kwargs)
        check_backward(func, args)
        if func in OF_GRAPHS:
            return self._of_graph(func, args)
        if func is torch.addmm and not kwargs and len(args) == 3 and args[0].ndim == 1:  # a layer of GPT-2
            func, args = functional.linear, (args[1], args[2].t(), args[0])
        learning = torch.is_grad_enabled()
        if learning and func in rnn.CELLS and functional.linear in self._plan and self._level.on_top():
            return self._recurrent(func, args, kwargs)
        if learning and func in self._plan and self._level.on_top():
            answer = self._layer(func, args, kwargs)
            if answer is not None:
                return answer
        if learning and self._tape is not None:
            args, kwargs = self._in_the_open(func, args, kwargs, given)
        if func in ROWWISE and self._level.on_top():
            with suppress(TypeError):  # arguments that torch says something about
                answer = ROWWISE[func](self._level, *args, **kwargs)
                if answer is not NotImplemented:
                    return answer
        return self.drawn.answer(func, args, kwargs)

    def _of_graph(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """What a tensor says of the graph that it is in: one for each example is in that of the whole batch."""
        (t, *_) = args
        if not self._level.wraps(t):
            return func(*args)
        if func == GRAD_FN:
            raise Unplanned("grad_fn, which reaches into the backward pass")
        return func(self._level.whole(t), *args[1:])

    def _layer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer to a call whose input is of the batch and whose weights are not; None for any other."""
        x, *others = args if args else (kwargs.get("input"),)
        more = {key: value for key, value in kwargs.items() if key != "input"} if kwargs else kwargs
        weights = tensors((*others, *more.values()))
        if not isinstance(x, Tensor) or x.is_complex() or any(map(self._level.wraps, weights)):
            return None
        if any(t.is_complex() for t in weights):
            return None
        learns = any(t.requires_grad for t in weights)
        if not self._level.wraps(x) and not (learns and self._tape is not None and not x.is_floating_point()):
            return None
        whole, alone = self._level.whole(x), x.ndim > 0 and x.shape[0] == 1
        if not alone and func in OF_BATCHES:
            return None
        given = whole.detach().squeeze(1) if alone else whole.detach()
        try:
            call = self._plan[func](given, *others, **more)
        except TypeError:  # arguments that no layer takes: torch says what it says of them
            return None
        if call is None:
            return None
        with self._level.below():
            if self._tape is not None and (learns or _faster(call)):
                return self._level.wrap(self._answer(call, whole, alone))
            of_batch = torch.matmul if func in OF_MATRICES else func
            out = of_batch(whole.squeeze(1) if alone else whole, *others, **more)
            return self._level.wrap(out.unsqueeze(1) if alone else out)

    def _answer(self, call: Call, x: Tensor, alone: bool) -> Tensor:
        """What the layer makes of ``x``, which has a dimension of 1 beside that of the batch if ``alone``."""
        assert self._tape is not None
        if self._tape.keep_calls:
            self._tape.calls.append(call)
        held = replace(call, x=None)  # or every input would live until the end of the backward pass
        device, narrow = x.device.type, call.name in NARROW and torch.is_autocast_enabled(x.device.type)
        if narrow and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(device))
        elif call.name not in NARROW and call.weight is not None and x.is_floating_point() and is_card(x.device):
            x = x.to(call.weight.dtype)  # CUDA's norms take one type, where the CPU's take two
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            out: Tensor = Planned.apply(self._tape, held, self.anchor, x, alone)  # type: ignore[no-untyped-call]
        return out

    def _recurrent(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """By layers on a tape; raises ``Unplanned`` without one, and for packed sequences."""
        if self._tape is None or kwargs:
            raise Unplanned(f"{name_of(func)} without layers")
        if rnn.is_packed(args):
            raise Unplanned("packed sequences, each of a length of its own")
        with self:
            return rnn.answer(self._recurrence, func, *args)

    def _recurrence(self, of: rnn.Direction, gates: Tensor, *states: Tensor) -> list[Tensor]:
        """Outputs ``[1, T, H]`` and last states ``[1, H]`` of a recurrence over ``gates[1, T, G * H]``."""
        before = _pop_mode()  # type: ignore[no-untyped-call]  # what it calls is no call of the module's
        try:
            with self._level.below(), torch.autocast(gates.device.type, enabled=False):
                first = (self._row_each(t, "first state") if self._learns(t) else t for t in states)
                whole = [self._level.whole(t).squeeze(1).to(of.weight.dtype) for t in (gates, *first)]
                found = rnn.Recurrence.apply(self._tape, of, self.anchor, *whole)  # type: ignore[no-untyped-call]
                return [self.made(self._level.wrap(t.unsqueeze(1))) for t in found]
        finally:
            _push_mode(before)  # type: ignore[no-untyped-call]

    def _in_the_open(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with a row for each example of what is a function of parameters alone."""
        if not any(map(self._learns, given)) or not (func in ANSWERS or any(map(self._level.wraps, given))):
            return args, kwargs
        name = name_of(func)
        if name in ("type_as", "to") and len(given) == 2:
            other = torch.empty((), dtype=given[1].dtype, device=given[1].device)  # what it is like, and no more
            return tuple(other if t is given[1] else t for t in args), {
                key: other if t is given[1] else t for key, t in kwargs.items()
            }
        if any(map(self._learns, tensors((args[:1] if writes(name) else (), kwargs.get("out"))))):
            raise Unplanned(f"{name} writes the batch into a function of parameters")

        def opened(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._row_each(value, name) if self._learns(value) else value
            if isinstance(value, tuple | list) and any(map(self._learns, tensors(value))):
                return [opened(one) for one in value]
            return value

        return tuple(map(opened, args)), {key: opened(value) for key, value in kwargs.items()}

    def _learns(self, t: Tensor) -> bool:
        """Whether ``t`` is a function of parameters alone."""
        return t.requires_grad and not self._level.wraps(t)

    def _row_each(self, t: Tensor, name: str) -> Tensor:
        assert self._tape is not None
        if id(t) not in self._rows:
            self._tape.opened.append((t, name))
            with self._level.below():
                rows = InTheOpen.apply(self._tape, [t], self.anchor, self._level.batch)  # type: ignore[no-untyped-call]
                self._rows[id(t)] = t, self.made(self._level.wrap(rows))
        return self._rows[id(t)][1]


def check_routed(leaves: Params, direct: Sequence[Tensor | None]) -> None:
    """Raise ``Unplanned`` for a parameter with a gradient of its own: no call showed that it was used."""
    used = [name for name, gradient in zip(leaves, direct, strict=True) if gradient is not None]
    if used:
        raise Unplanned(f"parameter {used[0]} is used where no call shows it")


def _faster(call: Call) -> bool:
    """Whether there is a kernel for a norm that has nothing to learn."""
    return call.name.endswith("_norm") and getattr(call.layer, "strategy", "") == "compiled" and call.x.ndim == 4


class Planned(torch.autograd.Function):
    """The two passes of a layer; what goes into it and comes out of it is in the graph, its parameters are not."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, call: Call, anchor: Tensor, x: Tensor, alone: bool) -> Tensor:
        ctx.tape, ctx.call, ctx.alone = tape, call, alone
        ctx.versions = versions((call.weight, call.bias))
        x = x.squeeze(1) if alone else x
        out, saved = call.layer.forward(x, _detached(call.weight, call, x), _detached(call.bias, call, x))
        ctx.save_for_backward(*saved)
        return out.unsqueeze_(1) if alone else out  # no view, which a module could not write into

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor | None, None]:
        call, grad = ctx.call, grads[0].squeeze(1) if ctx.alone else grads[0]
        tensors = {"weight": call.weight, "bias": call.bias}
        check_versions(tensors.values(), ctx.versions)
        roles = tuple(role for role, t in tensors.items() if t is not None and t.requires_grad)
        saved, weight = tuple(t.detach() for t in ctx.saved_tensors), _detached(call.weight, call, ctx.saved_tensors[0])
        gradient, found = call.layer.backward(grad, weight, saved, ctx.needs_input_grad[3], roles)
        for role, contribution in found.items():
            ctx.tape.add(tensors[role], contribution)
        return None, None, None, gradient if gradient is None or not ctx.alone else gradient.unsqueeze(1), None


class InTheOpen(torch.autograd.Function):
    """A row of a tensor for each example; their gradients are contributions to it."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, of: list[Tensor], anchor: Tensor, batch: int) -> Tensor:
        (t,) = of  # in a list, so that its own graph stays out of that of the loss
        ctx.tape, ctx.t, ctx.versions = tape, t, versions([t])
        return t.detach().expand(batch, *t.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        check_versions([ctx.t], ctx.versions)
        ctx.tape.add(ctx.t, Rows(data=wide(grads[0])))
        return None, None, None, None


def _detached(t: Tensor | None, call: Call, x: Tensor) -> Tensor | None:
    """As narrow as the input, where the layer is one that may be."""
    if t is None:
        return None
    return t.detach().to(x.dtype) if call.name in NARROW else t.detach()
