"""Weights by the inverse variance of the known noise: noisier clients count less.

*Reason*: among the unbiased weighted means of equally informative updates, weights proportional to 1 / variance give
the least noise (Gauss-Markov). The noise of clients differs if their budgets, sizes or sample rates differ.

*Bias*: the model minimises a mean that favours clients with little noise, and not the mean over examples. With weights
w and size shares p, the mean moves by at most ``sum |w - p| / 2`` times the largest distance between two updates;
``most`` bounds each weight by ``most * p``. If noise is proportional to 1 / size, w is proportional to the square of
the size. Weights depend on public numbers only.
"""

from __future__ import annotations

import numpy as np

from fed_dpsat.errors import SettingError
from fed_dpsat.flower.updates import KnownNoise, Updates, UpdateStrategy, Vector


class NoiseAware(UpdateStrategy):
    """Mean weighted by the inverse variance of each client's known noise, within bounds by its size."""

    def __init__(self, known_noise: KnownNoise, most: float = 4.0) -> None:
        super().__init__(known_noise)
        if not most >= 1:
            raise SettingError("most", most, "at least 1", "1 is FedAvg, 4 is usual")
        self.most = most

    def move(self, round: int, updates: Updates) -> Vector:
        return weights(updates.shares, updates.variances, self.most) @ updates.moves


def weights(shares: Vector, variances: Vector, most: float) -> Vector:
    """``[K]``, proportional to 1 / variance and at most ``most * shares``; not negative, with sum 1.

    Without noise they are ``shares``. The other clients get the weight above the bound, in proportion.
    """
    if not variances.min() > 0:
        return shares
    precise, bounded = 1 / variances, np.zeros(len(shares), dtype=bool)
    for _ in shares:
        found = np.where(bounded, most * shares, 0.0)
        found += np.where(bounded, 0.0, precise) * (1 - found.sum()) / max(precise[~bounded].sum(), 1e-300)
        if not (over := ~bounded & (found > most * shares)).any():
            break
        bounded |= over
    result: Vector = found / found.sum()
    return result


STRATEGIES = {"noise-aware": NoiseAware}
