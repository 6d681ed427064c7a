"""A bound on the norm of each update that allows for the known noise.

*Reason*: a single attacker needs a large update to control the mean; a bound on the norm prevents that (Sun et al.
2019, arXiv 1911.07963). The bound must not cut honest updates. With privacy noise their norms are about
sqrt(signal^2 + d v), which differs between clients. The bound is ``factor`` times the median norm without noise, plus
the known noise of the client.

*Bias*: it shortens honest updates that are much larger than the median. It limits an attack, and does not remove it.
"""

from __future__ import annotations

import numpy as np

from fed_dpsat.flower.updates import KnownNoise, Updates, UpdateStrategy, Vector


class NormBound(UpdateStrategy):
    """Mean of updates scaled down to a bound: `factor` times the median norm without noise, plus known noise."""

    def __init__(self, known_noise: KnownNoise, factor: float = 1.5) -> None:
        super().__init__(known_noise)
        self.factor = factor

    def move(self, round: int, updates: Updates) -> Vector:
        return (updates.shares * scales(updates, self.factor)) @ updates.moves


def scales(updates: Updates, factor: float) -> Vector:
    """``[K]`` in (0, 1]: the factor that scales each update to its bound; 1 for an update of zero."""
    squared = np.square(updates.moves).sum(axis=1)
    bound = factor**2 * np.median(updates.excess()) + updates.moves.shape[1] * updates.variances + 3 * updates.spread
    found: Vector = np.sqrt(np.divide(bound, squared, out=np.ones_like(squared), where=squared > bound))
    return found


STRATEGIES = {"norm-bound": NormBound}
