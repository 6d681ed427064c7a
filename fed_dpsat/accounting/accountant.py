"""Epsilon as a function of events, computed once per distinct history: PLD by default, RDP for comparison.

All events have one privacy unit. Both bounds come from dp_accounting. PLD is the tighter bound (``pld`` lists its
errors); RDP is the older and looser bound that many papers print.

==================== ==========================================================
case                 answer
==================== ==========================================================
no events            0
noise_multiplier = 0 inf
delta not in (0, 1)  ``PrivacyError``
events of two units  ``PrivacyError``
delta below 1e-13    ``PrivacyError`` under PLD if a Gaussian step is sampled, not under RDP
a sampled Laplace    ``PrivacyError`` under RDP: dp_accounting has no bound for it
==================== ==========================================================
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.accounting.event import History, PrivacyError, PrivacyEvent, check_one_unit, dominant, merge
from fed_dpsat.accounting.pld import SMALLEST_NOISE, epsilon_pld, unprotected

SMALLEST_DIVERGENCE = 1e-8  # the absolute error of dp_accounting is about 1e-15


def epsilon(events: Iterable[PrivacyEvent], delta: float, accountant: str = "pld") -> float:
    """Epsilon at ``delta`` of one client with these ``events``; their order does not matter."""
    return _epsilon(merge(events), _checked_delta(delta), _checked_accountant(accountant))


def epsilons(histories: Iterable[Iterable[PrivacyEvent]], delta: float, accountant: str = "pld") -> list[float]:
    """``epsilon`` of each history, computed once per distinct history; a repeated tuple is found by its identity."""
    known: dict[int, tuple[object, float]] = {}  # a reference to each history keeps its id unique
    found = []
    for history in histories:
        same = known.get(id(history))
        if same is None:
            same = history, epsilon(history, delta, accountant)
            if isinstance(history, tuple):
                known[id(history)] = same
        found.append(same[1])
    return found


def large_delta(delta: float, unit: str, size: int) -> str:
    """A warning if ``delta`` is too large for ``size``; else "". ``size`` counts clients, or the fewest of a ``unit``.

    A mechanism that publishes one random record of n in full is (0, 1 / n)-DP (Dwork and Roth 2014, section 2.3).
    """
    if delta < 1 / size:
        return ""
    of = {"example": "examples", "user": "persons"}.get(unit)
    records = f"number of {of} of the smallest client" if of else "number of clients"
    return (
        f"delta={delta:g} is not below 1/{size}, 1 / ({records}): such a delta permits to publish one of them in "
        "full; set delta far below that"
    )


def federation_epsilon(histories: Iterable[History], delta: float, accountant: str = "pld") -> float:
    """Maximum of epsilon over clients with disjoint data, given their merged histories; 0 without clients.

    The accountant runs only for the costliest histories (``dominant``): clients of different sizes cost one
    computation, not one each.
    """
    distinct = dominant(histories)
    check_one_unit(distinct)
    return max(epsilons(distinct, delta, accountant), default=0.0)


@lru_cache(maxsize=2**16)
def _epsilon(history: History, delta: float, accountant: str) -> float:
    check_one_unit([history])
    return ACCOUNTANTS[accountant](history, delta)


def epsilon_rdp(history: History, delta: float) -> float:
    """Upper bound of epsilon by Renyi divergences at the default orders of dp_accounting.

    Mironov 2017; conversion to epsilon of Canonne, Kamath and Steinke 2020. If noise_multiplier < 0.01, the bound
    ignores sampling, as in ``pld``: the series of dp_accounting overflow there, to an epsilon of 0.
    """
    from dp_accounting.rdp import RdpAccountant, compute_epsilon  # type: ignore[import-untyped]

    if not history:
        return 0.0
    if unprotected(history):
        return math.inf
    divergence = sum(event.compositions * step_rdp(event) for event in history)
    return float(compute_epsilon(RdpAccountant().orders, divergence, delta)[0])


def has_rdp(events: Iterable[PrivacyEvent]) -> bool:
    """Whether RDP bounds the events: dp_accounting takes a Laplace mechanism, but not with Poisson sampling."""
    return not any(event.is_laplace and event.sample_rate < 1 for event in events)


def step_rdp(event: PrivacyEvent) -> NDArray[np.float64]:
    """Renyi divergences of one step of ``event`` at the default orders of dp_accounting; ``PrivacyError`` for none."""
    if not has_rdp([event]):
        raise PrivacyError(
            f"accountant='rdp' has no bound for Laplace noise with sample_rate={event.sample_rate}; set "
            "accountant='pld', or sample_rate=1"
        )
    if event.is_laplace:
        return _laplace_rdp(event.noise_multiplier)
    return one_step_rdp(event.noise_multiplier, event.sample_rate)


@lru_cache(maxsize=4096)
def _laplace_rdp(noise_multiplier: float) -> NDArray[np.float64]:
    """Of one Laplace mechanism (Mironov 2017, Proposition 6)."""
    from dp_accounting import LaplaceDpEvent  # type: ignore[import-untyped]
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    accountant.compose(LaplaceDpEvent(noise_multiplier))
    divergence: NDArray[np.float64] = accountant.rdp
    return divergence


@lru_cache(maxsize=4096)
def one_step_rdp(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    """Renyi divergences of one sampled Gaussian at the default orders of dp_accounting; inf if a series diverges.

    Below ``SMALLEST_DIVERGENCE`` the values of dp_accounting are rounding errors, and negative ones make its epsilon
    0. This function then sums at integer orders without cancellation. (order - 1) times divergence is convex in the
    order, so linear interpolation between two integer orders is an upper bound.
    """
    from dp_accounting.rdp import RdpAccountant

    rate = sample_rate if noise_multiplier >= SMALLEST_NOISE else 1.0
    event = PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=rate, steps=1)
    accountant = RdpAccountant()
    with _without("failed to converge"):
        accountant.compose(event.to_dp_event())
    divergence: NDArray[np.float64] = accountant.rdp
    for i in np.flatnonzero(divergence < SMALLEST_DIVERGENCE) if rate < 1 else ():
        order = float(accountant.orders[i])
        below, share = math.floor(order), order % 1
        low, high = (_log_moment(whole, noise_multiplier, rate) for whole in (below, below + 1))
        divergence[i] = ((1 - share) * low + share * high) / (order - 1)
    return divergence


def _log_moment(order: int, noise_multiplier: float, sample_rate: float) -> float:
    """``order - 1`` times the divergence of one sampled Gaussian at an integer order (Mironov, Talwar and Zhang 2019).

    It is log(E[exp(k (k - 1) / (2 sigma^2))]) over a binomial k. The expectation minus 1 is a sum of positive terms,
    so a tiny result keeps its digits.
    """
    from scipy.special import gammaln  # type: ignore[import-untyped]

    k = np.arange(2, order + 1)
    exponents = k * (k - 1) / (2 * noise_multiplier**2)
    terms = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1) + (order - k) * math.log1p(-sample_rate)
    terms = terms + k * math.log(sample_rate) + exponents + np.log(-np.expm1(-exponents))
    return float(np.logaddexp(0.0, np.logaddexp.reduce(terms, initial=-np.inf)))


@contextmanager
def _without(phrase: str) -> Iterator[None]:
    """Drop the warning of absl, one per order, that a series did not converge.

    dp_accounting then leaves that order out, which can only raise the bound.
    """

    def keep(record: logging.LogRecord) -> bool:
        return phrase not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


ACCOUNTANTS = {"pld": epsilon_pld, "rdp": epsilon_rdp}


def _checked_delta(delta: float) -> float:
    if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not 0 < delta < 1:
        raise PrivacyError(f"delta={delta!r} is not in (0, 1); take less than 1 / (examples of a client)")
    return float(delta)


def _checked_accountant(accountant: str) -> str:
    if accountant not in ACCOUNTANTS:
        raise PrivacyError(f"accountant={accountant!r} is not one of {', '.join(ACCOUNTANTS)}; take 'pld'")
    return accountant
