"""A Kalman filter over the aggregated private update: it combines prediction and observation by the known noise.

*Reason*: the mean update of a round is a slowly changing signal plus Gaussian noise of known variance R. For a random
walk of variance Q with such noise, the optimal filter (Kalman 1960; on the client, DiSK, arXiv 2410.03883) estimates
``m + K (update - m)`` with ``K = (P + Q) / (P + Q + R)``. One scalar P serves all coordinates; Q is estimated from the
innovations, whose mean square has the expectation P + Q + R.

*Bias*: the estimate lags behind a change of direction, by a factor of 1 - K per round. Without noise, K = 1: FedAvg.
"""

from __future__ import annotations

import numpy as np

from fed_dpsat.flower.updates import KnownNoise, Updates, UpdateStrategy, Vector

MEMORY = 0.8
"""The share of the old estimate of Q in the new one."""


class Kalman(UpdateStrategy):
    """Kalman filter over the mean update, with the known variance of its noise.

    The estimate ``m`` has the variance ``p`` per coordinate; ``q`` is the variance of the drift per round.
    """

    def __init__(self, known_noise: KnownNoise) -> None:
        super().__init__(known_noise)
        self.m, self.p, self.q = np.zeros(0), 0.0, -1.0

    def move(self, round: int, updates: Updates) -> Vector:
        seen, r = updates.mean, updates.mean_variance
        believed = self.m if self.m.size else np.zeros_like(seen)
        drift = max(0.0, float(np.square(seen - believed).mean()) - self.p - r)
        self.q = drift if self.q < 0 else MEMORY * self.q + (1 - MEMORY) * drift
        prior = self.p + self.q
        gain = prior / (prior + r) if r > 0 else 1.0
        self.m, self.p = believed + gain * (seen - believed), (1 - gain) * prior
        return self.m


STRATEGIES = {"kalman": Kalman}
