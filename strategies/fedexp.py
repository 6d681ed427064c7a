"""FedExP with its step corrected for known noise: step further where clients' updates disagree, not where noise is.

*Reason*: clients that move in different directions shorten their mean; FedExP (Jhunjhunwala et al., ICLR 2023, arXiv
2301.09604) steps by ``mean |u|^2 / (2 |mean u|^2 + 2 epsilon)`` times the mean, here without the epsilon. Noise of
variance v adds ``d v`` to the first and so asks for huge steps; it is known, and subtracted (Takakura, Liew and
Hasegawa 2025, arXiv 2504.09850, LDP-FedEXP). The denominator keeps its noise, which makes the step smaller, never
larger. At least 1, at most ``most``.

*Bias*: none in direction. Where noise dominates the step is FedAvg's.
"""

from __future__ import annotations

import numpy as np
from flwr.serverapp.strategy import Strategy

from fed_dpsat.errors import SettingError
from fed_dpsat.flower.updates import KnownNoise, Updates, UpdateStrategy, Vector


class FedExP(UpdateStrategy):
    """The mean update times a step of at least 1."""

    def __init__(self, known_noise: KnownNoise, most: float) -> None:
        super().__init__(known_noise)
        if not most >= 1:
            raise SettingError("most", most, "at least 1", "1 is FedAvg")
        self.most = most

    def move(self, round: int, updates: Updates) -> Vector:
        return step(updates, self.most) * updates.mean


def step(updates: Updates, most: float) -> float:
    """``mean of (|u|^2 - d v) / (2 |mean u|^2)`` in [1, most]; 1 for a mean of zero."""
    dimensions = updates.moves.shape[1]
    of_updates = float(updates.shares @ (np.square(updates.moves).sum(axis=1) - dimensions * updates.variances))
    of_mean = float(np.square(updates.mean).sum())
    return min(max(1.0, of_updates / (2 * of_mean)), most) if of_mean > 0 else 1.0


def fedexp(known_noise: KnownNoise, most: float = 10.0) -> Strategy:
    """FedExP: a longer step where clients disagree, without what known noise adds to disagreement."""
    return FedExP(known_noise, most)


STRATEGIES = {"fedexp": fedexp}
