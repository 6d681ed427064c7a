"""A mean without outliers; an outlier is a client whose distance the noise does not explain.

*Reason*: a trimmed mean (Yin et al., ICML 2018) drops the extremes of each coordinate, with or without an attack. Under
privacy noise the extremes are noise, so it loses information. This strategy judges whole clients. The excess of a
client is its squared distance from the coordinate-wise median minus the expected noise of both. It drops a client only
if the excess is above ``factor`` squared times the median excess, and above three standard deviations of the squared
norm of the noise. It drops at most a share ``trim`` of clients, the farthest. The noise of the median itself must
count: without it, a client with little noise among noisy clients would be an outlier.

*Bias*: it drops honest clients with different data first: use it if the data of clients are alike.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.errors import SettingError
from fed_dpsat.flower.updates import KnownNoise, Updates, UpdateStrategy, Vector

DRAWS = 4000
DRAWING_ERROR = math.sqrt(2 / DRAWS)
"""Relative standard deviation of a variance that is estimated from ``DRAWS`` draws."""


class Trimmed(UpdateStrategy):
    """Mean without the clients that are farther from the median than known noise explains."""

    def __init__(self, known_noise: KnownNoise, trim: float = 0.3, factor: float = 2.0) -> None:
        super().__init__(known_noise)
        if not 0 <= trim < 0.5:
            raise SettingError("trim", trim, "in [0, 0.5)", "set the largest expected share of attackers")
        self.trim, self.factor = trim, factor

    def move(self, round: int, updates: Updates) -> Vector:
        weights = np.where(outliers(updates, self.trim, self.factor), 0.0, updates.shares)
        mean: Vector = (weights / weights.sum()) @ updates.moves
        return mean


def outliers(updates: Updates, trim: float, factor: float) -> NDArray[np.bool_]:
    """``[K]`` of bool: clients farther from the median than noise explains, at most a share ``trim`` of them."""
    dimensions = updates.moves.shape[1]
    noise = dimensions * noise_around_median(updates.variances)
    squared = np.square(updates.moves - np.median(updates.moves, axis=0)).sum(axis=1)
    excess = np.maximum(squared - noise, 0)
    far = excess > factor**2 * np.median(excess) + 3 * max(math.sqrt(2 / dimensions), DRAWING_ERROR) * noise
    farthest = np.argsort(-excess, kind="stable")[: int(trim * len(excess))]
    found: NDArray[np.bool_] = far & np.isin(np.arange(len(excess)), farthest)
    return found


def noise_around_median(variances: Vector) -> Vector:
    """``[K]``: the variance of each of K independent normals around the median of all, estimated from draws."""
    drawn = np.random.default_rng(0).standard_normal((DRAWS, len(variances))) * np.sqrt(variances)
    found: Vector = np.square(drawn - np.median(drawn, axis=1, keepdims=True)).mean(axis=0)
    return found


STRATEGIES = {"trimmed": Trimmed}
