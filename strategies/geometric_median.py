"""The geometric median of updates; distances do not include the norm of the known noise.

*Reason*: the point with the smallest sum of distances does not follow a minority, at any distance (RFA, Pillutla,
Kakade and Harchaoui, IEEE TSP 2022; smoothed Weiszfeld iterations). Privacy noise puts each client at a distance of
about sqrt(d v) from every point; without this norm, the distance is the signal of the client. A client whose distance
is explained by noise keeps its full weight, so honest federations get nearly the mean of FedAvg.

*Bias*: like any median, it favours the majority if honest clients have different data. It breaks down at half of the
examples. Sizes are declared, so a client that declares more examples gets more weight.
"""

from __future__ import annotations

import numpy as np

from fed_dpsat.flower.updates import Updates, UpdateStrategy, Vector

ITERATIONS = 50


class GeometricMedian(UpdateStrategy):
    """Geometric median of the updates, with the known noise subtracted from the distances."""

    def move(self, round: int, updates: Updates) -> Vector:
        return geometric_median(updates)


def geometric_median(updates: Updates) -> Vector:
    """``[d]``, by Weiszfeld's iteration from the coordinate-wise median; equal weights if noise explains all."""
    center: Vector = np.median(updates.moves, axis=0)
    smallest = max(1e-12 * float(np.median(updates.excess())), 1e-30)  # an attacker can choose the largest
    for _ in range(ITERATIONS):
        weights = updates.shares / np.sqrt(np.maximum(updates.excess(center), 2 * updates.spread + smallest))
        last, center = center, (weights / weights.sum()) @ updates.moves
        if np.square(center - last).sum() <= 1e-10 * np.square(center).sum():
            break
    return center


STRATEGIES = {"geometric-median": GeometricMedian}
