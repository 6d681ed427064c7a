"""Patches of channels-last images: what a convolution multiplies its weight with.

For kernels that move by one line at a time, a buffer of patches one line high serves every line of the kernel,
shifted: a third of the copying for three lines. The buffer holds few images, so that it stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from fed_dpsat.engines.conv import Geometry

BUFFER_BYTES = 900_000
"""About half of a core's second-level cache."""

Copy = tuple[tuple[slice | int, ...], tuple[slice, ...]]
"""Where in the buffer, and what of the image."""


def slices(geometry: Geometry) -> int:
    """How many shifted views of one buffer make up the patches of a 2d convolution."""
    return geometry.kernel[0] if geometry.stride[0] == 1 else 1


def buffers(geometry: Geometry, x: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Examples, and their patches ``[n, positions, width]`` in ``slices`` views; 2d, one group, ``x[B, C, H, W]``.

    What is yielded is overwritten by the next.
    """
    images = x.permute(0, 2, 3, 1)
    positions = math.prod(geometry.positions(tuple(x.shape[2:])))
    if geometry.kernel == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0):
        yield slice(None), [images.reshape(len(x), positions, -1)]
        return
    shape, copies = _layout(geometry, tuple(x.shape[2:]))
    step = max(1, min(len(x), BUFFER_BYTES // (math.prod(shape) * x.shape[1] * x.element_size())))
    buffer = x.new_zeros(step, *shape, x.shape[1])
    flat = buffer.view(step, math.prod(shape[:2]), -1)
    shift = geometry.dilation[0] * shape[1]
    views = [flat[:, k * shift : k * shift + positions] for k in range(slices(geometry))]
    targets = [buffer[(slice(None), *target)] for target, _ in copies]
    sources = [images[(slice(None), *source)].split_with_sizes(sizes(len(x), step)) for _, source in copies]
    for first, *parts in zip(range(0, len(x), step), *sources, strict=True):
        count = len(parts[0])
        if count < step:
            views, targets = [v[:count] for v in views], [t[:count] for t in targets]
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part)
        yield slice(first, first + count), views


def sizes(total: int, step: int) -> list[int]:
    """``total`` in parts of ``step``; the last may be smaller."""
    return [min(step, total - first) for first in range(0, total, step)]


def _layout(geometry: Geometry, sides: tuple[int, ...]) -> tuple[tuple[int, ...], list[Copy]]:
    """The shape of one image's buffer without channels, and what goes where from the image ``[H, W]``."""
    lines, width = geometry.positions(sides)
    (high, wide), padding = geometry.kernel, geometry.padding[0]
    across = [_overlap(geometry, sides, 1, j, width) for j in range(wide)]
    if geometry.stride[0] == 1:
        down = [(slice(padding, padding + sides[0]), slice(None))]
        lines = sides[0] + 2 * padding
    else:
        down = [_overlap(geometry, sides, 0, i, lines) for i in range(high)]
    copies: list[Copy] = [
        ((to_y, to_x, i * wide + j), (from_y, from_x))
        for i, (to_y, from_y) in enumerate(down)
        for j, (to_x, from_x) in enumerate(across)
    ]
    return (lines, width, len(copies)), copies


def _overlap(geometry: Geometry, sides: tuple[int, ...], axis: int, tap: int, count: int) -> tuple[slice, slice]:
    """Outputs that kernel position ``tap`` reads inside the image for, and what it reads."""
    stride, offset = geometry.stride[axis], tap * geometry.dilation[axis] - geometry.padding[axis]
    first = max(0, -(offset // stride))
    last = max(first, min(count, (sides[axis] - 1 - offset) // stride + 1))
    start = first * stride + offset
    return slice(first, last), slice(start, start + (last - first - 1) * stride + 1 if last > first else start, stride)


def gram(geometry: Geometry, x: Tensor) -> Tensor:
    """Inner products ``[B, positions, positions]`` of the patches of one image; 2d, one group."""
    positions = math.prod(geometry.positions(tuple(x.shape[2:])))
    found = x.new_empty(len(x), positions, positions)
    for examples, views in buffers(geometry, x):
        torch.bmm(views[0], views[0].transpose(1, 2), out=found[examples])
        for view in views[1:]:
            found[examples].baddbmm_(view, view.transpose(1, 2))
    return found


def unfold(geometry: Geometry, x: Tensor) -> Tensor:
    """Patches ``[B, groups, positions, kernel * C / groups]``, kernel position first; any dimensions."""
    widths = [width for p in reversed(geometry.padding) for width in (p, p)]
    padded = functional.pad(x.movedim(1, -1), (0, 0, *widths)).contiguous()
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


def side_by_side(x: Tensor) -> Tensor:
    """``[B, C, H, W] -> [1, B * C, H, W]``, channels last."""
    batch, channels, height, width = x.shape
    together = x.permute(2, 3, 0, 1).reshape(1, height, width, batch * channels)
    return together.permute(0, 3, 1, 2)
