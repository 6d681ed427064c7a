"""Conformance of accountants: epsilon is never too small, and composes over rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from fed_dpsat.accounting.accountant import epsilon as trusted_epsilon
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.testing.conformance import require, run_checks

Accountant = Callable[[Sequence[PrivacyEvent], float], float]

DELTA = 1e-5
PLD_ERROR = 1e-3
"""The PLD of fed_dpsat is above the exact epsilon by at most this share (``accounting.pld``); here by 3e-4."""

USEFUL = 10.0
"""An epsilon above this multiple of the trusted epsilon is useless."""


def event(noise_multiplier: float, sample_rate: float, steps: int) -> PrivacyEvent:
    """A ``PrivacyEvent``."""
    return PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


UNSAMPLED = [[event(5.0, 1.0, 2000)], [event(1.0, 1.0, 1)], [event(10.0, 1.0, 30)], [event(3.0, 1.0, 3)] * 5]
"""Closed form; the first is 100 rounds of 20 steps: 77.3. A client rate of 0.1 counted per step gives 3.92."""

SAMPLED = [
    [event(1.0, 0.008, 125)] * 3,
    [event(1.0, 0.008, 12_500)],
    [event(0.8, 0.1, 50)],
    [event(2.0, 0.5, 20), event(1.0, 0.05, 100), event(4.0, 1.0, 5)],
    [event(0.6, 0.01, 1)],
]


def check_accountant(accountant: Accountant) -> list[str]:
    """Run the suite on ``(events, delta) -> epsilon``; returns the names of the checks.

    ``events`` is a list, one entry per release of one client. Raises ``ConformanceError``.
    """
    return run_checks("accountant", CHECKS, accountant)


def no_events_cost_nothing(accountant: Accountant) -> None:
    """Without events, epsilon is 0."""
    _compare(accountant([], DELTA), 0.0, "epsilon = 0 without events", "start from 0", exactly=True)


def no_noise_costs_infinity(accountant: Accountant) -> None:
    """One step without noise costs inf, with or without other events."""
    for events in ([event(0.0, 0.1, 1)], [event(1.0, 0.1, 100), event(0.0, 0.01, 1)], [event(0.0, 1.0, 1)]):
        seen = accountant(events, DELTA)
        _compare(seen, math.inf, "epsilon = inf for noise_multiplier=0", "return inf", exactly=True)


def rounds_add_up(accountant: Accountant) -> None:
    """Three rounds of 125 steps cost the same as 375 steps, in any order; also 30 rounds."""
    one = event(1.0, 0.008, 125)
    for rounds in (3, 30):
        whole = accountant([replace(one, steps=rounds * one.steps)], DELTA)
        other = event(3.0, 0.1, 10)
        for what, seen, expected in (
            (f"{rounds} rounds", accountant([one] * rounds, DELTA), whole),
            ("another order", accountant([other, *[one] * rounds], DELTA), accountant([*[one] * rounds, other], DELTA)),
        ):
            require(
                math.isclose(seen, expected, rel_tol=0.01),
                expected=f"epsilon = {expected:.4g} for {rounds} rounds of {one.steps} steps, as for one long round",
                seen=f"{seen:.4g} for {what}",
                remedy="compose over all rounds of a client: a new accountant in each round forgets the others",
            )


def epsilon_grows_with_what_is_released(accountant: Accountant) -> None:
    """Epsilon grows with steps and sample_rate, and as noise_multiplier and delta shrink."""
    for what, costs in {
        "steps": [accountant([event(1.0, 0.01, n)], DELTA) for n in (1, 10, 100, 1000)],
        "sample_rate": [accountant([event(1.0, q, 100)], DELTA) for q in (0.001, 0.01, 0.1, 0.5, 1.0)],
        "1 / noise_multiplier": [accountant([event(s, 0.01, 100)], DELTA) for s in (8.0, 4.0, 2.0, 1.0, 0.7)],
        "1 / delta": [accountant([event(1.0, 0.01, 100)], d) for d in (1e-3, 1e-5, 1e-7)],
    }.items():
        require(
            all(a < b for a, b in pairwise(costs)),
            expected=f"an epsilon that grows with {what}",
            seen=", ".join(f"{cost:.4g}" for cost in costs),
            remedy=f"check the use of {what}",
        )


def gaussian_is_not_below_its_closed_form(accountant: Accountant) -> None:
    """Without sampling, epsilon is at least that of Balle and Wang (2018), Theorem 8."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian  # type: ignore[import-untyped]

    for events in UNSAMPLED:
        precision = sum(e.steps / e.noise_multiplier**2 for e in events)
        _at_least(accountant(events, DELTA), get_epsilon_gaussian(1 / math.sqrt(precision), DELTA) * (1 - 1e-6), events)


def sampled_gaussian_is_not_below_pld(accountant: Accountant) -> None:
    """With Poisson sampling, epsilon is at least that of privacy loss distributions minus their error."""
    for events in SAMPLED:
        _at_least(accountant(events, DELTA), trusted_epsilon(events, DELTA) * (1 - PLD_ERROR), events)


def epsilon_says_something(accountant: Accountant) -> None:
    """Epsilon is a number, at most ten times the trusted one."""
    for events in (*UNSAMPLED, *SAMPLED):
        bound = USEFUL * trusted_epsilon(events, DELTA)
        seen = accountant(events, DELTA)
        _compare(seen, bound, f"epsilon of at most {bound:.4g} for {_words(events)}", "the bound is loose or inf")


CHECKS = (
    no_events_cost_nothing,
    no_noise_costs_infinity,
    rounds_add_up,
    gaussian_is_not_below_its_closed_form,
    epsilon_grows_with_what_is_released,
    sampled_gaussian_is_not_below_pld,
    epsilon_says_something,
)


def _compare(seen: float, bound: float, expected: str, remedy: str, *, exactly: bool = False) -> None:
    require(seen == bound if exactly else seen <= bound, expected=expected, seen=f"{seen:.4g}", remedy=remedy)


def _at_least(seen: float, least: float, events: list[PrivacyEvent]) -> None:
    require(
        seen >= least,
        expected=f"epsilon of at least {least:.4g} for {_words(events)}, delta={DELTA}",
        seen=f"{seen:.4g}",
        remedy="count every step of every round at its sample rate: a client rate is one coin per round and does not "
        "multiply the rate of each step; it counts for nothing if the server sees the cohort",
    )


def _words(events: Sequence[PrivacyEvent]) -> str:
    told = [f"{e.steps} steps at noise {e.noise_multiplier:g} and rate {e.sample_rate:g}" for e in events]
    return " and ".join(f"{told.count(t)} times {t}" if told.count(t) > 1 else t for t in dict.fromkeys(told))
