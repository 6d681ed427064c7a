"""Epsilon as a function of events: PLD by default, RDP beside it, once per distinct history.

Unit: that of the events, which is one for all of them. Both bounds come from dp_accounting; PLD is the
tighter (errors in ``pld``), RDP the older and looser one that papers print.

==================== ==========================================================
case                 answer
==================== ==========================================================
no events            0
noise_multiplier = 0 inf
delta not in (0, 1)  ``PrivacyError``
events of two units  ``PrivacyError``
delta below 1e-13    ``PrivacyError`` under PLD where a step is sampled, not RDP
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

from fed_dpsat.accounting.event import History, PrivacyError, PrivacyEvent, dominant, merge, unit_of
from fed_dpsat.accounting.pld import SMALLEST_NOISE, epsilon_pld, unprotected

SMALLEST_DIVERGENCE = 1e-8  # dp_accounting's is off by about 1e-15 in absolute terms


def epsilon(events: Iterable[PrivacyEvent], delta: float, accountant: str = "pld") -> float:
    """Epsilon at ``delta`` of one client that released all of ``events``, in whatever order."""
    return _epsilon(merge(events), _checked_delta(delta), _checked_accountant(accountant))


def epsilons(histories: Iterable[Iterable[PrivacyEvent]], delta: float, accountant: str = "pld") -> list[float]:
    """``epsilon`` of each history, computed once per distinct one; the same tuple again is not even looked at."""
    known: dict[int, tuple[object, float]] = {}  # holds each history, so that its id stays its own
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
    """Why ``delta`` is too large for the smallest client's ``size`` examples, or ``size`` clients; empty if it is not.

    With a chance of 1 / n for each, publishing one of n in full would pass (Dwork and Roth 2014, section 2.3).
    """
    if delta < 1 / size:
        return ""
    whom = "the clients" if unit == "client" else "the examples of the smallest client"
    return (
        f"delta={delta:g} is not below 1/{size}, one of {whom}: with such a delta, to publish one of them in full "
        "would count as private; set delta far below that"
    )


def federation_epsilon(histories: Iterable[History], delta: float, accountant: str = "pld") -> float:
    """Maximum of epsilon over clients with disjoint data, given their merged histories; 0 for no client.

    Only the costliest histories are computed (``dominant``), so clients that differ in size cost one
    computation, not one each.
    """
    distinct = dominant(histories)
    unit_of(distinct)
    return max(epsilons(distinct, delta, accountant), default=0.0)


@lru_cache(maxsize=2**16)
def _epsilon(history: History, delta: float, accountant: str) -> float:
    unit_of([history])
    return ACCOUNTANTS[accountant](history, delta)


def epsilon_rdp(history: History, delta: float) -> float:
    """Upper bound of epsilon by Renyi divergences at dp_accounting's default orders.

    Mironov 2017; conversion to epsilon of Canonne, Kamath and Steinke 2020. Where noise_multiplier < 0.01 the
    sampling is not counted, as in ``pld``: dp_accounting's series overflow there, to an epsilon of 0.
    """
    from dp_accounting.rdp import RdpAccountant, compute_epsilon  # type: ignore[import-untyped]

    if not history:
        return 0.0
    if unprotected(history):
        return math.inf
    divergence = sum(event.steps * one_step_rdp(event.noise_multiplier, event.sample_rate) for event in history)
    return float(compute_epsilon(RdpAccountant().orders, divergence, delta)[0])


@lru_cache(maxsize=4096)
def one_step_rdp(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    """Renyi divergences of one sampled Gaussian at dp_accounting's default orders; inf where they do not converge.

    Below ``SMALLEST_DIVERGENCE`` dp_accounting's are rounding, and negative ones make its epsilon 0. There they are
    summed without cancellation at whole orders; (order - 1) times divergence is convex in the order, so a straight
    line between two of them is an upper bound.
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
    """``order - 1`` times the divergence of one sampled Gaussian at a whole order (Mironov, Talwar and Zhang 2019).

    It is the log of a mean of exp(k (k - 1) / (2 sigma^2)) over a binomial k. One less is a sum of positive terms, so
    tiny ones keep their digits.
    """
    from scipy.special import gammaln  # type: ignore[import-untyped]

    k = np.arange(2, order + 1)
    exponents = k * (k - 1) / (2 * noise_multiplier**2)
    terms = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1) + (order - k) * math.log1p(-sample_rate)
    terms = terms + k * math.log(sample_rate) + exponents + np.log(-np.expm1(-exponents))
    return float(np.logaddexp(0.0, np.logaddexp.reduce(terms, initial=-np.inf)))


@contextmanager
def _without(phrase: str) -> Iterator[None]:
    """Drop absl's warning, once per order, that a series did not converge.

    dp_accounting then leaves that order out: the bound stays one, and at most becomes looser.
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
