"""Memory formats: whether the channels of an image lie side by side (channels last) or each in its own plane.

On a card they have planes: CUDA's GroupNorm takes nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed_dpsat.placement import is_card

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
