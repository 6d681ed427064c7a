"""Patches of channels-last images: what a convolution multiplies its weight with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from fed_dpsat.engines.conv import Geometry


def pad(geometry: Geometry, x: Tensor) -> Tensor:
    """``x[B, C, *] -> [B, *, C]``, contiguous, with the zeros around it."""
    widths = [width for p in reversed(geometry.padding) for width in (p, p)]
    return functional.pad(x.movedim(1, -1), (0, 0, *widths)).contiguous()


def unfold(geometry: Geometry, x: Tensor) -> Tensor:
    """Patches ``[B, groups, positions, kernel * C / groups]``, kernel position first."""
    padded = pad(geometry, x)
    batch, channels = len(x), x.shape[1]
    positions, kernel = geometry.positions(tuple(x.shape[2:])), geometry.kernel
    steps = padded.stride()[1:-1]
    size = (batch, geometry.groups, *positions, *kernel, channels // geometry.groups)
    stride = (
        padded.stride(0),
        channels // geometry.groups,
        *(a * s for a, s in zip(steps, geometry.stride, strict=True)),
        *(a * d for a, d in zip(steps, geometry.dilation, strict=True)),
        1,
    )
    spread = padded.as_strided(size, stride)
    return spread.reshape(batch, geometry.groups, math.prod(positions), -1)


def gram(geometry: Geometry, x: Tensor) -> Tensor:
    """Inner products ``[B, positions, positions]`` of the patches of one image; one group."""
    if not _by_lines(geometry):
        flat = unfold(geometry, x)[:, 0]
        return torch.bmm(flat, flat.transpose(1, 2))
    height, width = geometry.positions(tuple(x.shape[2:]))
    lines = _lines(geometry, x, width)
    products = torch.bmm(lines, lines.transpose(1, 2))
    total: Tensor | None = None
    for k in range(geometry.kernel[0]):
        first = k * geometry.dilation[0] * width
        part = products[:, first : first + height * width, first : first + height * width]
        total = part if total is None else total + part
    assert total is not None
    return total


def gram_multiplications(geometry: Geometry, sides: tuple[int, ...]) -> float:
    """Multiplications of ``gram`` per position of the output."""
    positions = geometry.positions(sides)
    width = geometry.shape[1] * math.prod(geometry.kernel)
    if not _by_lines(geometry):
        return math.prod(positions) * width
    lines = (sides[0] + 2 * geometry.padding[0]) * positions[1]
    return lines * lines / math.prod(positions) * width / geometry.kernel[0]


def _by_lines(geometry: Geometry) -> bool:
    """Whether patches one line high, shifted, make up the patches: three times less to copy and multiply."""
    return len(geometry.kernel) == 2 and geometry.stride[0] == 1


def _lines(geometry: Geometry, x: Tensor, width: int) -> Tensor:
    """Patches one line high ``[B, padded height * width, kernel width * C]`` of ``x[B, C, H, W]``."""
    padded = pad(geometry, x)
    batch, high, _, channels = padded.shape
    each, line, step, _ = padded.stride()
    size = (batch, high, width, geometry.kernel[1], channels)
    stride = (each, line, step * geometry.stride[1], step * geometry.dilation[1], 1)
    return padded.as_strided(size, stride).reshape(batch, high * width, -1)


def side_by_side(x: Tensor) -> Tensor:
    """``[B, C, H, W] -> [1, B * C, H, W]``, channels last."""
    batch, channels, height, width = x.shape
    together = x.permute(2, 3, 0, 1).reshape(1, height, width, batch * channels)
    return together.permute(0, 3, 1, 2)
