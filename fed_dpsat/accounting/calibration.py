"""Calibration: the noise multiplier for a target epsilon, and a table of epsilon over rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fed_dpsat.accounting.accountant import epsilon
from fed_dpsat.accounting.event import PrivacyError, PrivacyEvent

LEAST, MOST = 0.01, 1e4  # range of noise multipliers in the search
TOLERANCE = 1.001


@dataclass(frozen=True, kw_only=True)
class EpsilonRow:
    """Epsilon of a schedule after ``rounds`` rounds, at one delta."""

    rounds: int
    epsilon_pld: float
    epsilon_rdp: float


def noise_multiplier_for(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "pld"
) -> float:
    """Smallest noise multiplier at which ``steps`` steps cost at most ``target_epsilon``.

    The result is at most 0.1 % too large and never too small: its epsilon is at most the target. Raises
    ``PrivacyError`` for a result above 10,000 or below 0.01, and for a target that is not positive and finite.
    """
    if isinstance(target_epsilon, bool) or not 0 < target_epsilon < math.inf:
        raise PrivacyError(
            f"target_epsilon={target_epsilon} is not in (0, inf); for no privacy, set noise_multiplier=0"
        )

    def cost(noise_multiplier: float) -> float:
        event = PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        return epsilon([event], delta, accountant)

    cost(MOST)  # raises for an invalid argument before the search starts
    low, high = _bracket(cost, target_epsilon, _guess(target_epsilon, delta, sample_rate, steps))
    return _narrowed(cost, target_epsilon, low, high)


def epsilon_table(
    noise_multiplier: float, sample_rate: float, local_steps: int, rounds: Sequence[int], delta: float
) -> list[EpsilonRow]:
    """One row for each entry of ``rounds``: epsilon of a client with ``local_steps`` steps in each round."""
    rows = []
    for count in rounds:
        events = [PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=local_steps * count)]
        rows.append(
            EpsilonRow(rounds=count, epsilon_pld=epsilon(events, delta), epsilon_rdp=epsilon(events, delta, "rdp"))
        )
    return rows


def _guess(target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """By the central limit theorem, many steps are close to one Gaussian mechanism (Bu et al. 2020, mu of GDP)."""
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian  # type: ignore[import-untyped]

    mu = 1 / get_sigma_gaussian(min(target_epsilon, 1e6), delta)
    noise = 1 / math.sqrt(math.log1p((mu / sample_rate) ** 2 / steps))
    return min(max(noise, 2 * LEAST), MOST / 2)


def _bracket(cost: Callable[[float], float], target: float, guess: float) -> tuple[float, float]:
    """(low, high) with cost(low) > target >= cost(high); the search steps away from the guess in growing factors."""
    low = high = guess
    factor = 1.25
    while cost(high) > target:
        if high >= MOST:
            raise PrivacyError(
                f"target_epsilon={target} needs noise_multiplier > {MOST:.0f}; raise the "
                "target or delta, or lower num_rounds, local_steps or sample_rate"
            )
        low, high, factor = high, min(high * factor, MOST), factor**2
    while low == high or cost(low) <= target:
        if low <= LEAST:
            raise PrivacyError(
                f"target_epsilon={target} needs noise_multiplier < {LEAST}, which "
                "gives no useful privacy; lower the target or delta"
            )
        low, high, factor = max(low / factor, LEAST), low, factor**2
    return low, high


def _narrowed(cost: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Upper end of the bracket after it is narrow: secant steps in log-log scale, on either side of the root."""
    tries = 0
    while high > low * TOLERANCE:
        above, below = cost(high), cost(low)
        if tries % 3 == 2 or above <= 0 or below == math.inf:
            point = math.sqrt(low * high)
        else:
            share = math.log(below / target) / math.log(below / above)
            point = low * (high / low) ** share * TOLERANCE ** (0.4 if tries % 3 == 0 else -0.4)
            point = min(max(point, low * TOLERANCE**0.5), high / TOLERANCE**0.5)
        if cost(point) > target:
            low = point
        else:
            high = point
        tries += 1
    return high
