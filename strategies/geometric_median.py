"""The geometric median of updates, whose distances leave out the norm of the known noise.

*Reason*: the point with the least sum of distances does not follow a minority however far it goes (RFA, Pillutla,
Kakade and Harchaoui, IEEE TSP 2022; smoothed Weiszfeld iterations). With privacy noise all clients are far from
everything, by about sqrt(d v), whatever they mean; less that norm, the distance is what a client means. Where noise
explains a distance the client keeps its full weight, so honest federations are averaged nearly as by FedAvg.

*Bias*: as of any median, it leans to the majority where honest clients differ in kind. Breaks down at half of the
examples, by declared size: sizes are declared, so clients that lie about theirs count for more.
"""

from __future__ import annotations

import numpy as np
from flwr.serverapp.strategy import Strategy

from fed_dpsat.flower.updates import KnownNoise, Updates, UpdateStrategy, Vector

ITERATIONS = 50


class GeometricMedian(UpdateStrategy):
    """Moves to the geometric median of the updates."""

    def move(self, round: int, updates: Updates) -> Vector:
        return geometric_median(updates)


def geometric_median(updates: Updates) -> Vector:
    """``[d]``, from the coordinates' median by Weiszfeld's iteration; all weights equal where noise is all there is."""
    center: Vector = np.median(updates.moves, axis=0)
    smallest = max(1e-12 * float(np.median(updates.excess())), 1e-30)  # not the largest, which an attacker chooses
    for _ in range(ITERATIONS):
        weights = updates.shares / np.sqrt(np.maximum(updates.excess(center), 2 * updates.spread + smallest))
        last, center = center, (weights / weights.sum()) @ updates.moves
        if np.square(center - last).sum() <= 1e-10 * np.square(center).sum():
            break
    return center


def build(known_noise: KnownNoise) -> Strategy:
    """Geometric median of the updates, with known noise taken off the distances."""
    return GeometricMedian(known_noise)


STRATEGIES = {"geometric-median": build}
