"""Lower bounds on epsilon from the number of correct guesses of an attack.

======================== ==========================================================================
case                     bound
======================== ==========================================================================
no guess, no repetition  0
every guess correct      finite: n guesses show at most about log(n / log(1 / (1 - confidence)))
guesses at random        0
======================== ==========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special, stats  # type: ignore[import-untyped]

from fed_dpsat.errors import SettingError


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound on the probability of at least ``correct`` correct guesses about ``canaries`` fair coins.

    Under (epsilon, delta)-DP, with W binomial of ``guesses`` and exp(epsilon) / (1 + exp(epsilon)), it is
    P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, for guesses
    that may abstain; their code computes the same). The number of guesses must not depend on the coins.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise SettingError("correct", correct, f"at most guesses={guesses}, at most {canaries} canaries", "count again")
    truthful = 1 / (1 + math.exp(-epsilon))
    tail = float(special.bdtrc(correct - 1, guesses, truthful)) if correct else 1.0
    if delta == 0 or correct == 0:
        return min(tail, 1.0)
    below = np.cumsum(
        stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, truthful)
    )  # P[v > W >= v - i] for i = 1 .. v
    worst = float((below / np.arange(1, correct + 1)).max())
    return min(tail + 2 * canaries * delta * worst, 1.0)


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest epsilon that ``correct`` correct guesses reject at ``confidence``; within 1e-6, rounded down."""
    check_confidence(confidence)

    def rejected(epsilon: float) -> bool:
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high):
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def best_one_run_epsilon(
    canaries: int, tries: Sequence[tuple[int, int]], delta: float, confidence: float
) -> tuple[float, int]:
    """``(epsilon, index)`` of the best of several ``(guesses, correct)``, each at its share of 1 - confidence.

    By the union bound, the best one holds with ``confidence``.
    """
    each = 1 - (1 - confidence) / len(tries)
    found = [one_run_epsilon(canaries, guesses, correct, delta, each) for guesses, correct in tries]
    best = int(np.argmax(found))
    return found[best], best


def upper_rate(count: int, trials: int, confidence: float) -> float:
    """Clopper-Pearson upper bound on a rate after ``count`` events in ``trials`` trials; 1 without trials."""
    return float(special.betaincinv(count + 1, trials - count, confidence)) if count < trials else 1.0


def two_world_rates(
    false_positives: int, false_negatives: int, trials: tuple[int, int], confidence: float
) -> tuple[float, float]:
    """Upper bounds that hold jointly for both error rates; ``trials`` counts those without and with the example."""
    check_confidence(confidence)
    each = 1 - (1 - confidence) / 2
    return upper_rate(false_positives, trials[0], each), upper_rate(false_negatives, trials[1], each)


def two_world_epsilon(
    false_positives: int, false_negatives: int, trials: tuple[int, int], delta: float, confidence: float
) -> float:
    """Lower bound from a test of two worlds: log((1 - delta - fnr) / fpr), or with the rates exchanged; at least 0.

    Kairouz, Oh and Viswanath 2015; with Clopper-Pearson bounds on both rates as in Jagielski, Ullman and Oprea 2020
    (arXiv 2006.07709). The choice of the threshold must use other repetitions.
    """
    fpr, fnr = two_world_rates(false_positives, false_negatives, trials, confidence)
    return max(0.0, _log_ratio(1 - delta - fnr, fpr), _log_ratio(1 - delta - fpr, fnr))


def gaussian_epsilon(
    false_positives: int, false_negatives: int, trials: tuple[int, int], delta: float, confidence: float
) -> float:
    """Lower bound IF the mechanism is Gaussian: mu >= z(1 - fpr) - z(fnr), and epsilon of mu at ``delta``.

    Nasr et al. 2023 (arXiv 2302.07956). It is much tighter than ``two_world_epsilon`` at a small delta, and invalid for
    another mechanism.
    """
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian  # type: ignore[import-untyped]

    fpr, fnr = two_world_rates(false_positives, false_negatives, trials, confidence)
    mu = float(-special.ndtri(fpr) - special.ndtri(fnr))
    return float(get_epsilon_gaussian(1 / mu, delta)) if mu > 1e-3 else 0.0


def check_confidence(confidence: float) -> None:
    """Raise ``SettingError`` unless it is in (0, 1)."""
    if not 0 < confidence < 1:
        raise SettingError("confidence", confidence, "in (0, 1)", "0.95 is usual")


def _log_ratio(true: float, false: float) -> float:
    return math.log(true / false) if true > 0 and false > 0 else 0.0
