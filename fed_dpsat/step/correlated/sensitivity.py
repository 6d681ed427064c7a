"""The sensitivity of a correlated mechanism: how far one participant moves ``C x``, over all patterns it may have.

A participant adds a vector of norm at most 1 to some of the ``num_steps`` rows of x. ``Participation`` says to which.
With X = C^T C, the square of the sensitivity is at most the sum of ``|X_ij|`` over the worst pattern, and equal to it
if no entry of X is negative (arXiv 2211.06530, section 2; 2306.08153, equation 5).

============================================ ==================================================================
case                                         value
============================================ ==================================================================
Toeplitz, 0 <= c and c does not increase     exact: arXiv 2405.13763, Theorem 2
Toeplitz, at most ``min_separation`` bands   exact: such columns are orthogonal, and the first ones are longest
any other Toeplitz                           an upper bound: that of the least c above ``|c|`` that does not
                                             increase, whose X is at least ``|X|``
any matrix                                   an upper bound: arXiv 2306.08153, Algorithm 4
steps of a fixed order, any matrix           exact if no entry of X is negative, else an upper bound
============================================ ==================================================================

The formula for c that does not increase is no bound for another c: with c = (1, -.2, .6, -.5, .3), 4 participations 3
apart in 12 steps have 3.16, and the formula gives 1.81.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.errors import SettingError

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Participation:
    """At most ``most`` of ``num_steps`` steps, any two of them at least ``min_separation`` apart.

    With ``fixed_order`` they are exactly ``min_separation`` apart: passes in one order that never changes. Raises
    ``SettingError`` for a number below 1, and for more participations than the steps have room for.
    """

    num_steps: int
    most: int
    min_separation: int
    fixed_order: bool = False

    def __post_init__(self) -> None:
        for name in ("num_steps", "most", "min_separation"):
            if getattr(self, name) < 1:
                raise SettingError(name, getattr(self, name), "at least 1", "count steps from 1")
        if self.most > (room := math.ceil(self.num_steps / self.min_separation)):
            bound = f"at most {room}: {self.num_steps} steps, {self.min_separation} apart, have room for no more"
            raise SettingError("participations", self.most, bound, "lower it, or lower min_separation")

    def sum_of_shifts(self, c: Vector) -> Vector:
        """The sum of the columns 0, b, 2b, ... of the Toeplitz matrix with the first column ``c[n]``."""
        total = np.zeros(self.num_steps)
        for first in range(0, self.most * self.min_separation, self.min_separation):
            total[first:] += c[: self.num_steps - first]
        return total

    def sum_of_earlier(self, v: Vector) -> Vector:
        """The transpose of ``sum_of_shifts``."""
        total = np.zeros(self.num_steps)
        for first in range(0, self.most * self.min_separation, self.min_separation):
            total[: self.num_steps - first] += v[first:]
        return total


def toeplitz_sensitivity(c: Vector, participation: Participation) -> float:
    """The sensitivity of the Toeplitz matrix whose first column is ``c[n]``; its zeros count, so n is never guessed.

    Raises ``ValueError`` for another number of coefficients than of steps.
    """
    if len(c) != participation.num_steps:
        raise ValueError(f"{len(c)} coefficients for {participation.num_steps} steps; pad them with zeros")
    bands = int(np.flatnonzero(c)[-1]) + 1
    if bands <= participation.min_separation:
        firsts = range(0, participation.most * participation.min_separation, participation.min_separation)
        return math.sqrt(sum(float(np.square(c[: len(c) - first]).sum()) for first in firsts))
    above = np.maximum.accumulate(np.abs(c)[::-1])[::-1]
    return float(np.linalg.norm(participation.sum_of_shifts(above)))


def matrix_sensitivity(matrix: Vector, participation: Participation) -> float:
    """The sensitivity of ``matrix[m, n]``, or an upper bound; O(n^2 most) in time and n^2 in memory."""
    x = np.abs(matrix.T @ matrix)
    if participation.fixed_order:
        return math.sqrt(max(_in_order(x, first, participation) for first in range(participation.num_steps)))
    diagonal = np.count_nonzero(x - np.diag(np.diag(x))) == 0
    of_rows = np.diag(x) if diagonal else np.array([_heaviest(row, participation) for row in x])
    return math.sqrt(_heaviest(of_rows, participation))


def _in_order(x: Vector, first: int, participation: Participation) -> float:
    steps = np.arange(first, participation.num_steps, participation.min_separation)[: participation.most]
    return float(x[np.ix_(steps, steps)].sum())


def _heaviest(weights: Vector, participation: Participation) -> float:
    """The largest sum of at most ``most`` of ``weights``, at least ``min_separation`` apart (2306.08153, Alg. 3)."""
    apart = participation.min_separation
    best = np.zeros(len(weights) + 1)  # [t]: among the first t weights
    for _ in range(participation.most):
        before = np.concatenate([np.zeros(apart - 1), best])[: len(weights)]
        best = np.concatenate([[0.0], np.maximum.accumulate(weights + before)])
    return float(best[-1])
