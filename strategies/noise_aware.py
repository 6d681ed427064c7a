"""Weights by the inverse variance of the known noise: clients with small budgets, sets or rates say less.

*Reason*: of all unbiased weighted means of equally informative updates, that with weights proportional to 1 / variance
has the least noise (Gauss-Markov). Clients differ in noise where budgets, sizes or sample rates do.

*Bias*: the model no longer minimises the mean over examples but a mean that leans to the clients with little noise.
With weights w and size shares p the mean moves by at most ``sum |w - p| / 2`` times the largest distance between two
clients' updates; ``most`` bounds each weight by ``most * p``. Where noise is proportional to 1 / size alone, w is
proportional to size squared. Weights depend on public numbers only.
"""

from __future__ import annotations

import numpy as np
from flwr.serverapp.strategy import Strategy

from fed_dpsat.errors import SettingError
from fed_dpsat.flower.updates import KnownNoise, Updates, UpdateStrategy, Vector


class NoiseAware(UpdateStrategy):
    """The mean of updates, weighted by inverse variance."""

    def __init__(self, known_noise: KnownNoise, most: float) -> None:
        super().__init__(known_noise)
        if not most >= 1:
            raise SettingError("most", most, "at least 1", "1 is FedAvg, 4 is usual")
        self.most = most

    def move(self, round: int, updates: Updates) -> Vector:
        return weights(updates.shares, updates.variances, self.most) @ updates.moves


def weights(shares: Vector, variances: Vector, most: float) -> Vector:
    """``[K]``, proportional to 1 / variance but at most ``most * shares``; not negative, and sum to one.

    Without noise they are ``shares``. What the bound cuts off is dealt to the others in proportion.
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


def noise_aware(known_noise: KnownNoise, most: float = 4.0) -> Strategy:
    """Mean weighted by the inverse variance of each client's known noise, within bounds by its size."""
    return NoiseAware(known_noise, most)


STRATEGIES = {"noise-aware": noise_aware}
