"""Patches of images: what a convolution multiplies its weight with, and their inner products."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.step.gradients.formats import is_channels_last
from fed_dpsat.step.gradients.geometry import Geometry

MANY = 8
"""From so many on, a strided copy is as fast as ``torch.cat``, which is twice as fast for two."""


def gram(geometry: Geometry, x: Tensor) -> Tensor:
    """Inner products ``[B, positions, positions]`` of the patches of one image ``x[B, C, H, W]``; one group.

    Where the kernel moves by single steps, those of pixels suffice: two patches' product is the sum over the kernel
    of products of pixels, which lie on a diagonal of the pixels' matrix.
    """
    if set(geometry.stride) != {1}:
        patches = unfold(geometry, x)[:, 0]
        return torch.bmm(patches, patches.transpose(1, 2))
    batch, _, *sides = x.shape
    pixels = x.flatten(2).transpose(1, 2)
    inner = torch.bmm(pixels, pixels.transpose(1, 2)).view(batch, *sides, *sides)
    (high, wide), (across, down) = _padded(geometry, tuple(sides)), geometry.padding[::-1]
    inner = functional.pad(inner, (across, across, down, down) * 2).view(batch, -1)
    width = high * wide
    for taps, apart in zip(geometry.kernel[::-1], (geometry.dilation[1], geometry.dilation[0] * wide), strict=True):
        inner = _shifted_sum(inner, taps, apart * (width + 1))
    (lines, columns) = geometry.positions(tuple(sides))
    strides = inner.stride(0), wide * width, width, wide, 1
    found = inner.as_strided((batch, lines, columns, lines, columns), strides)
    return found.reshape(batch, lines * columns, lines * columns)


def gram_cost(geometry: Geometry, sides: tuple[int, ...]) -> float:
    """What ``gram`` costs for one image of two dimensions, in multiplications of a matrix product."""
    channels, positions = geometry.shape[1], math.prod(geometry.positions(sides))
    if set(geometry.stride) != {1}:
        return positions * channels * math.prod(geometry.kernel) * (positions + 40)
    return math.prod(sides) ** 2 * channels + 60 * math.prod(_padded(geometry, sides)) ** 2


def _padded(geometry: Geometry, sides: tuple[int, ...]) -> tuple[int, int]:
    high, wide = (side + 2 * p for side, p in zip(sides, geometry.padding, strict=True))
    return high, wide


def _shifted_sum(flat: Tensor, count: int, shift: int) -> Tensor:
    """``sum_k flat[:, k * shift :]``, ``count`` terms, as long as the shortest of them."""
    length = flat.shape[1] - (count - 1) * shift
    if count == 1:
        return flat
    total = flat[:, :length] + flat[:, shift : shift + length]
    for k in range(2, count):
        total += flat[:, k * shift : k * shift + length]
    return total


def unfold(geometry: Geometry, x: Tensor) -> Tensor:
    """Patches ``[B, groups, positions, kernel * C / groups]``, kernel position first; any dimensions."""
    batch, positions = len(x), math.prod(geometry.positions(tuple(x.shape[2:])))
    return windows(geometry, x).reshape(batch, geometry.groups, positions, -1)


def windows(geometry: Geometry, x: Tensor) -> Tensor:
    """The patches of ``unfold`` as a view of padded ``x``: ``[B, groups, *positions, *kernel, C / groups]``."""
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
    return padded.as_strided(size, stride)


def windows_by_plane(geometry: Geometry, x: Tensor) -> Tensor:
    """The same patches with positions side by side in memory: ``[B, C, *kernel, *positions]``; one group."""
    widths = [width for p in reversed(geometry.padding) for width in (p, p)]
    padded = functional.pad(x.contiguous(), widths)
    steps = padded.stride()[2:]
    positions = geometry.positions(tuple(x.shape[2:]))
    stride = (
        *padded.stride()[:2],
        *(a * d for a, d in zip(steps, geometry.dilation, strict=True)),
        *(a * s for a, s in zip(steps, geometry.stride, strict=True)),
    )
    return padded.as_strided((*x.shape[:2], *geometry.kernel, *positions), stride)


def side_by_side(x: Tensor, rows: int = 1) -> Tensor:
    """``[G * R, C, H, W] -> [R, G * C, H, W]``, in the format of ``x``; of one of ``rows`` planes, without a copy."""
    batch, channels, height, width = x.shape
    if rows > 1:
        apart = x.view(-1, rows, *x.shape[1:]).transpose(0, 1)
        if not is_channels_last(x):
            return apart.reshape(rows, -1, height, width)
        return apart.permute(0, 3, 4, 1, 2).reshape(rows, height, width, -1).permute(0, 3, 1, 2)
    if not is_channels_last(x):
        return x.reshape(1, batch * channels, height, width)
    pixels = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    abreast = torch.cat(pixels.unbind(0), 1) if batch < MANY else pixels.transpose(0, 1).reshape(height * width, -1)
    return abreast.view(1, height, width, batch * channels).permute(0, 3, 1, 2)
