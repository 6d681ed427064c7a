"""The forward pass with every layer that holds parameters replaced by one that keeps what its sum needs.

A torch function mode sees each call that a module makes, whatever class it is of; calls whose weights lead to
the parameters are answered by a ``Layer``. The parameters never enter the graph of the loss, so their ordinary
gradients are not computed; one that enters it all the same was used in a way that is not planned for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fed_dpsat.step.draws import of_batch
from fed_dpsat.step.gradients.contribution import Contribution, Unplanned
from fed_dpsat.step.gradients.course import Course
from fed_dpsat.step.gradients.drawing import ATTENTION as ATTENTION
from fed_dpsat.step.gradients.drawing import UNCHECKED_ATTENTION, Pass
from fed_dpsat.step.placement import is_card

NARROW = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
"""Layers that compute in the dtype of ``torch.autocast``, where that is on; contributions are in float32 even so."""


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


@dataclass
class Tape:
    """Contributions in the order of the backward pass, with the tensor that each is to; ``calls`` forward."""

    calls: list[Call] = field(default_factory=list)
    found: list[tuple[Tensor, Contribution, str]] = field(default_factory=list)
    keep_calls: bool = False
    gradients: list[Tensor] = field(default_factory=list)


class Capture(TorchFunctionMode):
    """Routes calls to layers; ``plan`` turns a function and its arguments into a ``Call``, or None."""

    def __init__(self, tape: Tape, plan: dict[Callable[..., Any], Callable[..., Call]], batch: int) -> None:
        super().__init__()
        self.tape, self.plan, self.batch = tape, plan, batch
        self.drawn = Pass(of_batch(batch))
        self.course = Course()
        self.sequence_first = False
        self.anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer ``func`` by a layer where its weights lead to parameters; else call it."""
        kwargs = kwargs or {}
        self.course.note(func, args, kwargs)
        if func is ATTENTION:
            return self._attention(*args, **kwargs)
        if func not in self.plan or not torch.is_grad_enabled():
            return self.drawn.answer(func, args, kwargs)
        call = self.plan[func](*args, **kwargs)
        if not any(t is not None and t.requires_grad for t in (call.weight, call.bias)) and not self._faster(call):
            return func(*args, **kwargs)
        if self.sequence_first:
            return self._sequence_first(call)
        return self._answer(call)

    def _faster(self, call: Call) -> bool:
        """Whether we have a kernel for a norm that has nothing to learn."""
        ours = call.name.endswith("_norm") and getattr(call.layer, "strategy", "") == "compiled"
        return ours and not self.sequence_first and call.x.ndim == 4 and call.x.shape[0] == self.batch

    def _answer(self, call: Call) -> Any:
        if call.x.ndim < 1 or call.x.shape[0] != self.batch:
            raise Unplanned(f"{call.name} of an input that does not start with the batch dimension")
        if self.tape.keep_calls:
            self.tape.calls.append(replace(call, x=call.x.detach()))  # its graph holds the tape: neither could go
        held = replace(call, x=None)  # or every input would live until the end of the backward pass
        x, device = call.x, call.x.device.type
        if call.name in NARROW and x.is_floating_point() and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        elif call.name not in NARROW and call.weight is not None and x.is_floating_point() and is_card(x.device):
            x = x.to(call.weight.dtype)  # CUDA's norms take one type, where the CPU's take two
        with torch.autocast(device, enabled=False):
            return Planned.apply(self.tape, held, self.anchor, x)  # type: ignore[no-untyped-call]

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        before, self.sequence_first = self.sequence_first, True
        try:
            with self.drawn.in_attention(), self:
                return UNCHECKED_ATTENTION(*args, **kwargs)
        finally:
            self.sequence_first = before

    def _sequence_first(self, call: Call) -> Any:
        """Inside of torch's attention: ``[T, B, D]``, or that with the first two dimensions in one."""
        if call.name != "linear" or call.x.numel() % (self.batch * call.x.shape[-1]):
            raise Unplanned(f"{call.name} in attention")
        x = call.x.reshape(-1, self.batch, call.x.shape[-1]).transpose(0, 1)
        out = self._answer(self.plan[torch.nn.functional.linear](x, call.weight, call.bias))
        return out.transpose(0, 1).contiguous().view(*call.x.shape[:-1], out.shape[-1])


class Planned(torch.autograd.Function):
    """The two passes of a layer; what goes into it and comes out of it is in the graph, its parameters are not."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, call: Call, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.tape, ctx.call = tape, call
        out, saved = call.layer.forward(x, _detached(call.weight, call, x), _detached(call.bias, call, x))
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor | None]:
        call, (grad,) = ctx.call, grads
        tensors = {"weight": call.weight, "bias": call.bias}
        roles = tuple(role for role, t in tensors.items() if t is not None and t.requires_grad)
        if ctx.tape.keep_calls:
            ctx.tape.gradients.append(grad)
        saved, weight = tuple(t.detach() for t in ctx.saved_tensors), _detached(call.weight, call, ctx.saved_tensors[0])
        gradient, found = call.layer.backward(grad, weight, saved, ctx.needs_input_grad[3], roles)
        for role, contribution in found.items():
            ctx.tape.found.append((tensors[role], contribution, call.name))
        return None, None, None, gradient


def check_routed(leaves: dict[str, Tensor], direct: Sequence[Tensor | None]) -> None:
    """Raise ``Unplanned`` for a parameter with a gradient of its own: it was used in the open."""
    used = [name for name, gradient in zip(leaves, direct, strict=True) if gradient is not None]
    if used:
        raise Unplanned(f"parameter {used[0]} is used outside linear, conv, norm and embedding layers")


def _detached(t: Tensor | None, call: Call, x: Tensor) -> Tensor | None:
    """As narrow as the input, where the layer is one that may be."""
    if t is None:
        return None
    return t.detach().to(x.dtype) if call.name in NARROW else t.detach()
