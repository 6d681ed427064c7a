"""Epsilon from privacy loss distributions (PLD) of dp_accounting, on a grid that fits the history.

``PLDAccountant`` of dp_accounting rounds every loss to multiples of 1e-4. At noise_multiplier=20, sample_rate=0.0005
the loss of a step is smaller than this grid, and epsilon is 2 times too large; for large losses the grid is slow.
This module uses a grid with ``POINTS_PER_DEVIATION`` points per standard deviation of the loss of a step.

========================== ===================================================================================
error of epsilon           size, measured (tests/accounting/test_pld.py repeats a part)
========================== ===================================================================================
grid                       too high by at most 3e-4 of epsilon if noise_multiplier >= 0.5 and
                           sample_rate >= 1e-3, by 1e-3 below 0.5. Connect-the-dots (arXiv 2207.04380)
                           rounds up.
millions of steps          dp_accounting sets negative rounding errors of the masses of a step to 0, so the
                           sum exceeds 1: too high, by 2e-3 at 2**22 steps of noise_multiplier 1,
                           sample_rate 1e-3
very rare, large losses    a grid of more than 2**18 points becomes coarser: too high, by 2e-3 if
                           noise_multiplier >= 0.8 and sample_rate >= 1e-5, by more below
double precision           FFT rounding can hide ``steps * 2**-52`` of delta; delta is lowered by this amount,
                           and an amount over 1 % of delta raises ``PrivacyError``
sample_rate = 1 throughout none: closed form (Balle and Wang 2018, Eq. 6), solved to 1e-12
noise_multiplier < 0.01    the bound ignores sampling; it is in the thousands
Laplace events             grid, as above; without Gaussian ones never above the pure epsilon, which holds at any
                           delta
========================== ===================================================================================

A Laplace mechanism adds noise of scale b to numbers that one example moves by at most C in L1 norm. Whatever their
count, the pair (Lap(0, b), Lap(C, b)) dominates it (``docs/privacy.md`` has the proof).

The two directions, adding an example and removing one, are composed; epsilon is the larger.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fed_dpsat.accounting.event import History, PrivacyError, PrivacyEvent

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import (  # type: ignore[import-untyped]
        PrivacyLossDistribution,
    )

POINTS_PER_DEVIATION = 24
MAX_POINTS = 2**18
MAX_SAMPLED_STEPS = 2**26
FINEST, COARSEST = 2.0**-24, 2.0**6
SMALLEST_NOISE = 0.01  # dp_accounting overflows below this
_LARGEST_PRECISION = 1e6  # sum of steps / noise_multiplier**2 over unsampled events: epsilon over 500,000
_TAIL = 1e-15  # dp_accounting moves this mass of the tail of each composition to infinity


def epsilon_pld(history: History, delta: float) -> float:
    """Upper bound of epsilon at ``delta`` for a merged history; 0 without events, inf for an event without noise.

    Raises ``PrivacyError`` if delta is too small for double precision, unless all events are Laplace.
    """
    if not history:
        return 0.0
    if unprotected(history):
        return math.inf
    plain, parts = _split(history)
    laplace = tuple(event for event in history if event.is_laplace)
    pure = math.fsum(event.steps * _pure_epsilon(event) for event in laplace)
    bound = pure + (_epsilon_gaussian(plain, delta) if plain else 0.0)  # without a Gaussian it holds at any delta
    if not parts:
        return bound
    only_laplace = len(laplace) == len(history)
    steps = sum(event.steps for event in parts)
    if only_laplace and (steps > MAX_SAMPLED_STEPS or _lost(steps) > delta / 100):
        return pure
    if steps > MAX_SAMPLED_STEPS:
        raise PrivacyError(
            f"steps={steps} with sampling is over {MAX_SAMPLED_STEPS}, the most that "
            "PLD composes in memory; set accountant='rdp'"
        )
    lost = _lost(steps)
    if lost > delta / 100:
        raise PrivacyError(
            f"delta={delta} is below {100 * lost:.1e}, the smallest that double precision "
            f"resolves over {steps} steps; raise delta or set accountant='rdp'"
        )
    found = _epsilon_of(composed(history), delta - lost)
    return min(found, pure) if only_laplace else found


def _lost(steps: int) -> float:
    return _TAIL + 2.0**-52 * steps


def _pure_epsilon(event: PrivacyEvent) -> float:
    """Epsilon at delta 0 of one Laplace step: log(1 + q (e^epsilon - 1)), the larger of both directions."""
    q, whole = event.sample_rate, 1 / event.noise_multiplier
    return whole if q == 1 or whole > 500 else math.log1p(q * math.expm1(whole))


def unprotected(history: History) -> bool:
    """Whether an event has no noise, or so little that its square underflows."""
    return any(event.noise_multiplier < 1e-100 for event in history)


def discretization(history: History) -> float:
    """Grid step for the losses of a merged history: a power of two, so that grids coincide.

    For equal events the step does not depend on their number, so epsilon grows with the number of steps. An
    independent check is ``PLDAccountant(value_discretization_interval=discretization(history))``.
    """
    plain, parts = _split(history)
    moments = [(event.steps, *_loss_spread(event.noise_multiplier, _rate(event), event.is_laplace)) for event in parts]
    if plain:
        moments.append((1, plain, 20 * math.sqrt(plain) + plain))
    variance = sum(steps * spread for steps, spread, _ in moments) / sum(steps for steps, _, _ in moments)
    fine = 2.0 ** math.floor(math.log2(max(math.sqrt(variance) / POINTS_PER_DEVIATION, FINEST)))
    affordable = 2.0 ** math.ceil(math.log2(max(support for *_, support in moments) / MAX_POINTS))
    return min(max(fine, affordable, FINEST), COARSEST)


def _split(history: History) -> tuple[float, History]:
    """The precision of Gaussians without sampling, which compose into one, and the events with a grid of their own.

    A precision is steps / noise_multiplier**2, and precisions add up. Without a grid for any of the events, the bound
    ignores sampling, and Laplace events add their pure epsilon.
    """
    parts = tuple(event for event in history if event.is_laplace or _rate(event) < 1)
    plain = sum(_precision(event) for event in history if event not in parts)
    if any(event.noise_multiplier < SMALLEST_NOISE for event in parts) or plain > _LARGEST_PRECISION:
        return sum(_precision(event) for event in history if not event.is_laplace), ()
    return plain, parts


def _rate(event: PrivacyEvent) -> float:
    return event.sample_rate if event.sample_rate < 1 - 1e-9 else 1.0


def _precision(event: PrivacyEvent) -> float:
    return event.compositions / event.noise_multiplier**2


def _epsilon_gaussian(precision: float, delta: float) -> float:
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian  # type: ignore[import-untyped]

    with np.errstate(all="ignore"):  # log(0) on the way to the root
        return float(get_epsilon_gaussian(1 / math.sqrt(precision), delta))


def composed(history: History) -> PrivacyLossDistribution:
    """The privacy loss distribution of a merged history with noise in each event, on its own grid."""
    (plain, events), grid = _split(history), discretization(history)
    parts = [
        _one_step(event.noise_multiplier, _rate(event), grid, event.is_laplace).self_compose(event.steps)
        for event in events
    ]
    if plain:
        parts.append(_one_step(1 / math.sqrt(plain), 1.0, grid))
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return total


def _epsilon_of(total: PrivacyLossDistribution, delta: float) -> float:
    """Smallest epsilon at ``delta``; above 500, where exp(-epsilon) of dp_accounting underflows, by bisection."""
    with np.errstate(over="ignore"):
        found = float(total.get_epsilon_for_delta(delta))
    if found < 500:
        return found
    low = high = 500.0
    while total.get_delta_for_epsilon(high) > delta:
        if high > 1e15:
            return math.inf
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if total.get_delta_for_epsilon(middle) > delta:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=32)
def _one_step(
    noise_multiplier: float, sample_rate: float, grid: float, is_laplace: bool = False
) -> PrivacyLossDistribution:
    """The distribution of one step; at most 4 MB, and expensive for a run that computes epsilon in every round."""
    from dp_accounting.pld import privacy_loss_distribution  # type: ignore[import-untyped]

    mechanism = (
        privacy_loss_distribution.from_laplace_mechanism
        if is_laplace
        else privacy_loss_distribution.from_gaussian_mechanism
    )
    return mechanism(noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=grid)


@lru_cache(maxsize=4096)
def _loss_spread(noise_multiplier: float, sample_rate: float, is_laplace: bool = False) -> tuple[float, float]:
    """Variance and width of the support of the loss of one step, for the removal of an example."""
    sigma, rate = noise_multiplier, sample_rate
    z = np.linspace(-10.0, 10.0, 4001)
    weight = np.exp(-np.abs(z)) if is_laplace else np.exp(-z * z / 2)
    weight /= weight.sum()
    x = np.stack([sigma * z, 1 + sigma * z])  # without and with the example
    ratio = (np.abs(x) - np.abs(x - 1)) / sigma if is_laplace else (2 * x - 1) / (2 * sigma**2)
    loss = np.logaddexp(math.log1p(-rate) if rate < 1 else -math.inf, math.log(rate) + ratio)
    mass = np.array([[1 - rate], [rate]]) * weight
    mean = (mass * loss).sum()
    return float((mass * (loss - mean) ** 2).sum()), float(loss.max() - loss.min())
