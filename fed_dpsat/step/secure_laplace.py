"""Laplace noise that floating point does not betray: exact, from the coins of a ``SystemGenerator``.

Textbook Laplace noise in floating point tells its sum (Mironov 2012). Here, as in ``secure_noise``, the sum is rounded
to a grid before it meets noise on that grid. The noise is continuous Laplace noise, rounded to the grid, with exactly
its probabilities: whole numbers are drawn by fair coins and comparisons of integers alone, as Canonne, Kamath and
Steinke 2020 (arXiv 2004.00010, Algorithms 1 and 2) draw the discrete Laplace distribution. So a result is that of the
Laplace mechanism, rounded, whatever the data, and also far in the tails.

Not protected: the sum it is given, as in ``secure_noise``, and time, which tells a little of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fed_dpsat.step.secure_noise import SystemGenerator, grid_of


def add_laplace_on_grid(
    clipped_sum: Mapping[str, Tensor], *, noise_multiplier: float, clip_norm: float, generator: SystemGenerator
) -> dict[str, Tensor]:
    """``clipped_sum``, one number per name, plus Laplace noise on the grid, in the types and on the devices given.

    The scale of the noise is a whole number of grid steps, at least ``noise_multiplier * (clip_norm + grid * count)``:
    two sums at most C apart in L1 norm are at most C + grid * count apart once each number is rounded.
    """
    grid = grid_of(noise_multiplier * clip_norm)
    scale = math.ceil(noise_multiplier * (clip_norm / grid + len(clipped_sum)))
    noisy = {}
    for name, total in clipped_sum.items():
        steps = torch.round(total.to("cpu", torch.float64) / grid) + rounded_laplace(scale, generator)
        noisy[name] = (steps * grid).to(total)
    return noisy


def rounded_laplace(scale: int, generator: SystemGenerator) -> int:
    """Continuous Laplace noise of ``scale``, at least 1, rounded to a whole number.

    It is 0 but with probability exp(-1 / (2 scale)); else its size is 1 or more, and each step further has probability
    exp(-1 / scale).
    """
    if not _exponential_coin(1, 2 * scale, generator):
        return 0
    size = 1 + _geometric(scale, generator)
    return size if generator.integers(2) else -size


def _geometric(scale: int, generator: SystemGenerator) -> int:
    """A whole number g or more with probability exp(-g / scale)."""
    while True:
        rest = int(generator.integers(scale))
        if _exponential_coin(rest, scale, generator):
            break
    whole = 0
    while _exponential_coin(1, 1, generator):
        whole += 1
    return rest + scale * whole


def _exponential_coin(numerator: int, denominator: int, generator: SystemGenerator) -> bool:
    """True with probability exp(-numerator / denominator), which is at least exp(-1)."""
    tosses = 1
    while int(generator.integers(denominator * tosses)) < numerator:
        tosses += 1
    return tosses % 2 == 1
