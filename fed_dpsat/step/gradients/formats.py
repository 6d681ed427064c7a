"""Memory formats: whether the channels of an image lie side by side (channels last) or each in its own plane.

On a card they have planes: CUDA's GroupNorm takes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.step.placement import is_card

POOL = "MaxPool2DWithIndicesBackward0"
POOLS = (functional.max_pool2d, functional.avg_pool2d, torch.max_pool2d)
"""Ten times slower where channels have planes."""

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """By the stride of the channels ``x[B, C, *]``, which says it also where there is but one."""
    return x.ndim in FORMATS and x.stride(1) == 1 and not is_card(x.device)


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """``x[B, C, *]`` in one format or the other, so that ``is_channels_last`` says so; itself if it is already."""
    if not channels_last or x.ndim not in FORMATS or is_card(x.device):
        return x.contiguous()
    if x.is_contiguous(memory_format=FORMATS[x.ndim]) and is_channels_last(x):
        return x
    return torch.empty_like(x, memory_format=FORMATS[x.ndim]).copy_(x)


def dense(x: Tensor) -> Tensor:
    """``x`` without gaps, in its own format."""
    return laid_out(x, is_channels_last(x))


def alike(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the format of ``x``, both of as many dimensions."""
    return laid_out(y, is_channels_last(x))


def unset(shape: tuple[int, ...], x: Tensor) -> Tensor:
    """Room for ``shape``, of as many dimensions as ``x``, in its format."""
    memory_format = FORMATS[x.ndim] if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def turn_gradients(total: Tensor) -> None:
    """Have max pools whose channels are last given such gradients in the backward pass of ``total``.

    A flat layer behind a pool sends back channels in planes. Torch then copies the gradient of the pool's input twice,
    across its layout, which takes a CPU six times as long as the rest of that backward pass.
    """
    waiting = [total.grad_fn]
    found = {None, *waiting}
    while waiting:
        node: Any = waiting.pop()
        if type(node).__name__ == POOL and is_channels_last(node._saved_self):
            node.register_prehook(_channels_last)
        for behind, _ in node.next_functions:
            if behind not in found:
                found.add(behind)
                waiting.append(behind)


def _channels_last(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradient of a pool's output, None where nothing depends on it, and None for its indices."""
    return tuple(g if g is None else g.contiguous(memory_format=torch.channels_last) for g in gradients)


def suits_channels_last(calls: Iterable[Any], functions: set[object]) -> bool:
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
        if hasattr(call.layer, "geometry"):
            geometry = call.layer.geometry
            if geometry.groups > 1:
                return True
            positions = math.prod(geometry.positions(tuple(call.x.shape[2:])))
            planes += 0.0032 * positions * math.prod(geometry.shape)
            last += 0.3 * (values + positions * geometry.shape[0]) * (call.layer.strategy == "channels")
        elif call.name in ("group_norm", "instance_norm"):
            last += 0.5 * values
    return last <= planes
