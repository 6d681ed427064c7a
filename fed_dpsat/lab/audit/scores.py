"""Attacks: each maps a repetition to a score, which should be larger if the example is present.

``Seen`` holds the releases of n repetitions. ``along[n, T]`` is the component of each private gradient along the
clipped gradient of the example, in units of the clip norm: 0 without the example, 1 with it, with noise of standard
deviation ``noise_multiplier``, or of that scale if it is Laplace. ``norms[n, T]`` is its squared norm; ``moves[n, R]``
is the move of each round along that direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.lab.audit.bounds import two_world_epsilon

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """``n`` repetitions in one world; ``along`` and ``norms`` are ``[n, T]``, ``moves`` is ``[n, R]``."""

    along: Values
    norms: Values
    moves: Values

    def part(self, rows: slice) -> Seen:
        """The repetitions in ``rows``."""
        return Seen(along=self.along[rows], norms=self.norms[rows], moves=self.moves[rows])


@dataclass(frozen=True, kw_only=True)
class Guess:
    """Guesses "with" if ``sign`` times the score named ``score`` is above ``threshold``."""

    score: str
    sign: int
    threshold: float


def log_likelihood_ratio(
    along: Values, noise_multiplier: float, sample_rate: float, noise_distribution: str = "gaussian"
) -> Values:
    """The log-likelihood ratio of each row of steps under the declared mechanism: the optimal test if it is correct.

    For Laplace noise it is that of one number a step.
    """
    if noise_multiplier == 0:
        total: Values = along.sum(1)
        return total
    if noise_distribution == "laplace":
        exponent = (np.abs(along) - np.abs(along - 1)) / noise_multiplier
    else:
        exponent = (along - 0.5) / noise_multiplier**2
    mixture = np.logaddexp(np.log(sample_rate) + exponent, np.log1p(-sample_rate) if sample_rate < 1 else -np.inf)
    summed: Values = mixture.sum(1)
    return summed


def scores(
    seen: Seen, noise_multiplier: float, sample_rate: float, noise_distribution: str = "gaussian"
) -> dict[str, Values]:
    """The scores ``[n]`` of every attack."""
    gap = np.sort(seen.along, 1)
    return {
        "likelihood ratio": log_likelihood_ratio(seen.along, noise_multiplier, sample_rate, noise_distribution),
        "sum of steps": seen.along.sum(1),
        "largest difference of two steps": gap[:, -1] - gap[:, 0],
        "steps released as exact zeros": (seen.norms == 0).sum(1).astype(np.float64),
        "size of the steps": seen.norms.sum(1),
        "move of the model": seen.moves.sum(1),
    }


def choose(without: dict[str, Values], with_it: dict[str, Values], delta: float, confidence: float) -> Guess:
    """The attack, sign and threshold with the best bound on these repetitions; measure it on others."""
    best, chosen = -1.0, Guess(score="likelihood ratio", sign=1, threshold=0.0)
    for name, low in without.items():
        for sign in (1, -1):
            for threshold in _candidates(sign * low, sign * with_it[name]):
                guess = Guess(score=name, sign=sign, threshold=threshold)
                bound = two_world_epsilon(*errors(guess, without, with_it), delta, confidence)
                if bound > best:
                    best, chosen = bound, guess
    return chosen


def errors(guess: Guess, without: dict[str, Values], with_it: dict[str, Values]) -> tuple[int, int, tuple[int, int]]:
    """``(false positives, false negatives, (repetitions without, with))``."""
    out, into = (guess.sign * world[guess.score] > guess.threshold for world in (without, with_it))
    return int(out.sum()), int((~into).sum()), (len(out), len(into))


def _candidates(low: Values, high: Values) -> list[float]:
    """Thresholds at the middles between neighbouring quantiles of both worlds."""
    values = np.unique(np.concatenate([low, high]))
    middles = (values[1:] + values[:-1]) / 2
    if len(middles) == 0:
        return []
    ranks = np.linspace(0, 1, min(len(middles), 65))
    return [float(t) for t in np.unique(np.quantile(middles, ranks, method="nearest"))]
