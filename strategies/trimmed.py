"""A mean without outliers, where an outlier is a client that noise does not explain.

*Reason*: a trimmed mean (Yin et al., ICML 2018) drops extremes in each coordinate whether anybody attacks or not, and
under privacy noise the extremes are noise: it throws information away. Here whole clients are judged by their squared
distance from the coordinates' median less what the known noise of both adds, and dropped only if what is left is more
than ``factor`` squared times the median client's, and more than three standard deviations of the noise's squared norm.
At most a share ``trim`` of clients is dropped, the farthest. Without the noise of the median itself, precise clients
among noisy ones would be the outliers.

*Bias*: honest clients whose data differ in kind are the farthest, and dropped first: use it where clients are alike.
"""

from __future__ import annotations

import math

import numpy as np
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fed_dpsat.errors import SettingError
from fed_dpsat.flower.updates import KnownNoise, Updates, UpdateStrategy, Vector

DRAWS = 4000
DRAWING_ERROR = math.sqrt(2 / DRAWS)
"""Relative standard deviation of a variance that is drawn so often."""


class Trimmed(UpdateStrategy):
    """The mean, weighted by size, of clients that are no outliers."""

    def __init__(self, known_noise: KnownNoise, trim: float, factor: float) -> None:
        super().__init__(known_noise)
        if not 0 <= trim < 0.5:
            raise SettingError("trim", trim, "in [0, 0.5)", "take the share of attackers you fear")
        self.trim, self.factor = trim, factor

    def move(self, round: int, updates: Updates) -> Vector:
        weights = np.where(outliers(updates, self.trim, self.factor), 0.0, updates.shares)
        mean: Vector = (weights / weights.sum()) @ updates.moves
        return mean


def outliers(updates: Updates, trim: float, factor: float) -> NDArray[np.bool_]:
    """``[K]`` of bool: the farthest from the median beyond what noise explains, at most ``trim`` of them."""
    dimensions = updates.moves.shape[1]
    noise = dimensions * noise_around_median(updates.variances)
    squared = np.square(updates.moves - np.median(updates.moves, axis=0)).sum(axis=1)
    excess = np.maximum(squared - noise, 0)
    far = excess > factor**2 * np.median(excess) + 3 * max(math.sqrt(2 / dimensions), DRAWING_ERROR) * noise
    farthest = np.argsort(-excess, kind="stable")[: int(trim * len(excess))]
    found: NDArray[np.bool_] = far & np.isin(np.arange(len(excess)), farthest)
    return found


def noise_around_median(variances: Vector) -> Vector:
    """``[K]``: of K independent normals of these variances, the variance of each around the median of all; drawn."""
    drawn = np.random.default_rng(0).standard_normal((DRAWS, len(variances))) * np.sqrt(variances)
    found: Vector = np.square(drawn - np.median(drawn, axis=1, keepdims=True)).mean(axis=0)
    return found


def trimmed(known_noise: KnownNoise, trim: float = 0.3, factor: float = 2.0) -> Strategy:
    """Mean without the clients that are farther from the median than known noise explains."""
    return Trimmed(known_noise, trim, factor)


STRATEGIES = {"trimmed": trimmed}
