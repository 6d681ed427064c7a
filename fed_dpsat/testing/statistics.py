"""Statistics of noise with fixed seeds: each bound is five or six standard deviations."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.float64]

SMALLEST = 20_000
"""Draws that distinguish 0.9 and 1.1 sigma from sigma: the variance is known to 5 %, and differs by 19 %."""


def variance_bounds(count: int) -> tuple[float, float]:
    """Bounds of the mean square of ``count`` standard normals: chi-square, five standard deviations."""
    width = 5 * math.sqrt(2 / count)
    return 1 - width, 1 + width


def kolmogorov_distance(z: Draws) -> float:
    """``sqrt(n)`` times the largest distance of the empirical distribution from N(0, 1); above 2.5 with p < 1e-5."""
    from scipy.stats import kstest  # type: ignore[import-untyped]

    return float(math.sqrt(len(z)) * kstest(z, "norm").statistic)


def correlation(a: Draws, b: Draws) -> float:
    """``sqrt(n)`` times the correlation of ``a[n]`` and ``b[n]``: standard normal for independent draws."""
    a, b = a - a.mean(), b - b.mean()
    return float(math.sqrt(len(a)) * (a @ b) / max(math.sqrt((a @ a) * (b @ b)), 1e-300))


def largest_autocorrelation(z: Draws) -> float:
    """``sqrt(n)`` times the largest circular autocorrelation of ``z[n]`` at any lag; above 6.5 with p < 1e-5."""
    z = z - z.mean()
    power = np.abs(np.fft.rfft(z)) ** 2
    lags = np.fft.irfft(power, len(z))
    return float(math.sqrt(len(z)) * np.abs(lags[1:]).max() / max(lags[0], 1e-300))
