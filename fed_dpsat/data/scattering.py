"""The scattering transform of an image: a fixed extractor of features, made of wavelets and moduli; nothing is learned.

Sources: S. Mallat, "Group Invariant Scattering", 2012; E. Oyallon and S. Mallat, "Deep Roto-Translation Scattering for
Object Classification", 2015. Filters, padding and order of paths are those of kymatio 0.3.0 (BSD-3-Clause), which
gives the same numbers to 1e-4. Kymatio transforms each path alone; here all wavelets of a scale share a pass, and the
low-pass filter, which is a product of two filters of one dimension, is two small matrices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.data import scattering_kernel
from fed_dpsat.errors import DataError

CHUNK = 16
"""Number of channels that are transformed at a time, never fewer: the bits of an image depend on nothing beside it."""


class Scattering:
    """``x[B, C, H, W]`` (0..1) to ``[B, C * paths, H / 2^J, W / 2^J]``: all paths of order 0, 1 and 2 of each channel.

    ``paths`` is ``1 + J L + L^2 J (J - 1) / 2``: 81 for ``scales`` J = 2 and ``angles`` L = 8. Sides are rounded down.
    Raises ``DataError`` for inputs of another form, and for sides that are too small.
    """

    def __init__(self, scales: int = 2, angles: int = 8) -> None:
        if any(type(n) is not int or n < 1 for n in (scales, angles)):
            raise DataError(
                f"features='scattering': scales={scales!r}, angles={angles!r} are not whole numbers of at least 1; "
                "2 and 8 are usual"
            )
        self.scales, self.angles = scales, angles

    def __call__(self, x: Tensor) -> Tensor:
        side = 2**self.scales
        if x.ndim != 4 or min(x.shape[2:]) < side:
            raise DataError(
                f"features='scattering' takes images [N, C, H, W] with sides of {side} or more, not inputs "
                f"{list(x.shape)}; lower scales in features_args, or give another extractor"
            )
        height, width = x.shape[2:]
        bank = _bank(height, width, self.scales, self.angles, x.device)
        channels = x.reshape(-1, height, width)
        filled = torch.cat([channels, channels.new_zeros(-len(channels) % CHUNK, height, width)])
        found = [bank.paths(part) for part in torch.split(filled, CHUNK)]
        return torch.cat(found)[: len(channels)].reshape(len(x), -1, *found[0].shape[2:])


class _Bank:
    """The filters of one size of images; ``paths`` applies them."""

    def __init__(self, height: int, width: int, scales: int, angles: int, device: torch.device) -> None:
        self.scales, self.count = scales, 1 + scales * angles + angles**2 * scales * (scales - 1) // 2
        side = 2**scales
        sizes = [((n + side) // side + 1) * side for n in (height, width)]
        self.rows, self.columns = (
            torch.from_numpy(_reflected(n, size)).to(device) for n, size in zip((height, width), sizes, strict=True)
        )
        wavelets = [_wavelets(sizes[0], sizes[1], scale, angles) for scale in range(scales)]
        self.wavelets = [[_real(_folded(wavelets[j], 2**i)).to(device) for i in range(j + 1)] for j in range(scales)]
        self.low = [[_real(_low_pass(size, scales, j)).to(device) for size in sizes] for j in range(scales)]
        self.compiled = device.type == "cpu" and scattering_kernel.library() is not None
        if self.compiled:
            self.lanes = [[scattering_kernel.in_lanes(one / one[0].numel()) for one in of] for of in self.wavelets]

    def paths(self, x: Tensor) -> Tensor:
        """``[K, count, h, w]`` of ``x[K, H, W]``."""
        padded = x.float()[:, self.rows][:, :, self.columns]
        transform = torch.fft.rfft2 if self.compiled else torch.fft.fft2
        transformed, first, second = transform(padded), [], []
        for j in range(self.scales):
            last = j + 1 == self.scales
            moduli, smooth = self._moduli(transformed, j, 0, smooth_only=last)
            first.append(smooth)
            if moduli is not None:
                again = transform(moduli.flatten(0, 1))
                of_scale = [self._moduli(again, k, j, smooth_only=True)[1] for k in range(j + 1, self.scales)]
                second.append(torch.cat(of_scale, 1).view(len(x), -1, *smooth.shape[2:]))
        return torch.cat([self._smooth(padded, 0)[:, None], *first, *second], 1)

    def _moduli(self, transformed: Tensor, scale: int, at: int, *, smooth_only: bool) -> tuple[Tensor | None, Tensor]:
        """Moduli ``[K, angles, m, n]`` at ``scale``, unless ``smooth_only``, and those after the low-pass filter.

        ``transformed[K, M, N]``, or half of it for the compiled loop, is at resolution ``at``.
        """
        step, low = 2 ** (scale - at), (self.low[scale][0], self.low[scale][1])
        if self.compiled:
            lanes, angles = self.lanes[scale][at], len(self.wavelets[scale][at])
            return scattering_kernel.wavelet_moduli(transformed, lanes, low, angles, step, smooth_only=smooth_only)
        m, n = transformed.shape[-2] // step, transformed.shape[-1] // step
        blocks = [(..., slice(a, a + m), slice(b, b + n)) for a in range(0, m * step, m) for b in range(0, n * step, n)]
        filters = self.wavelets[scale][at] / step**2
        folded = torch.stack([transformed[:, None][block] * filters[block] for block in blocks]).sum(0)
        found = torch.fft.ifft2(folded)
        moduli = found.real.square().add_(found.imag.square()).sqrt_()
        return None if smooth_only else moduli, self._smooth(moduli, scale)

    def _smooth(self, x: Tensor, at: int) -> Tensor:
        """``[..., h, w]`` of ``x[..., m, n]`` at resolution ``at``."""
        rows, columns = self.low[at]
        return rows @ x @ columns.T


@functools.lru_cache(maxsize=8)
def _bank(height: int, width: int, scales: int, angles: int, device: torch.device) -> _Bank:
    return _Bank(height, width, scales, angles, device)


def _real(filters: np.ndarray) -> Tensor:
    return torch.from_numpy(filters.astype(np.float32))


def _reflected(n: int, size: int) -> np.ndarray:
    """Indices ``[size]`` into ``n`` pixels, which are in the middle, reflected at the borders."""
    period, before = max(1, 2 * (n - 1)), (size - n) // 2
    places = np.abs(np.arange(-before, size - before)) % period
    reflected: np.ndarray = np.minimum(places, period - places)
    return reflected


def _wavelets(height: int, width: int, scale: int, angles: int) -> np.ndarray:
    """``[angles, height, width]``: Morlet wavelets in Fourier space, real."""
    sigma, frequency, slant = 0.8 * 2**scale, 0.75 * math.pi / 2**scale, 4.0 / angles
    y, x = (np.arange(-2 * n, 3 * n, dtype=np.float64) for n in (height, width))
    y, x = y[:, None], x[None]
    found = []
    for angle in range(angles):
        theta = (int(angles - angles / 2 - 1) - angle) * math.pi / angles
        along, across = y * math.cos(theta) + x * math.sin(theta), x * math.cos(theta) - y * math.sin(theta)
        envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
        wave = _wrapped(envelope * np.exp(1j * frequency * along), height, width)
        bump = _wrapped(envelope, height, width)
        wavelet = wave - wave.sum() / bump.sum() * bump
        found.append(np.fft.fft2(wavelet * slant / (2 * 3.1415 * sigma**2)).real)  # 3.1415 as in kymatio
    return np.stack(found)


def _low_pass(size: int, scales: int, at: int) -> np.ndarray:
    """``[size / 2^J - 2, size / 2^at]``: a Gaussian on a circle of pixels at resolution ``at``.

    It has every 2^(J - at)-th row. The first and the last row are in the padding.
    """
    sigma = 0.8 * 2 ** (scales - 1)
    x = np.arange(-2 * size, 3 * size, dtype=np.float64)
    bump = _wrapped(np.exp(-(x**2) / (2 * sigma**2))[:, None], size, 1)[:, 0] / math.sqrt(2 * 3.1415 * sigma**2)
    kernel = np.fft.ifft(_folded(np.fft.fft(bump).real[:, None], 2**at)[:, 0]).real
    places = np.arange(0, len(kernel), 2 ** (scales - at))[1:-1]
    matrix: np.ndarray = kernel[(places[:, None] - np.arange(len(kernel))) % len(kernel)]
    return matrix


def _wrapped(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """``[height, width]``: the sum of the tiles of ``x``."""
    tiles: np.ndarray = x.reshape(x.shape[0] // height, height, x.shape[1] // width, width).sum((0, 2))
    return tiles


def _folded(filters: np.ndarray, step: int) -> np.ndarray:
    """``filters[..., M, N]`` of Fourier space at a resolution ``step`` times lower, without frequencies above that."""
    for axis in (-2, -1):
        size = filters.shape[axis]
        if size == 1:
            continue
        small = size // step
        kept = np.r_[0 : small // 2, size - (small + 1) // 2 : size] if step > 1 else np.arange(size)
        places = kept % small
        moved = np.moveaxis(filters, axis, 0)
        folded = np.zeros((small, *moved.shape[1:]), filters.dtype)
        np.add.at(folded, places, moved[kept])
        filters = np.moveaxis(folded, 0, axis)
    return filters


FEATURES: dict[str, Callable[..., Any]] = {"scattering": Scattering}
