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

from fed_dpsat.privacy.event import History, PrivacyError, PrivacyEvent, dominant, merge, unit_of
from fed_dpsat.privacy.pld import SMALLEST_NOISE, epsilon_pld, unprotected


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
    """Renyi divergences of one sampled Gaussian at dp_accounting's default orders; inf where they do not converge."""
    from dp_accounting.rdp import RdpAccountant

    rate = sample_rate if noise_multiplier >= SMALLEST_NOISE else 1.0
    event = PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=rate, steps=1)
    accountant = RdpAccountant()
    with _without("failed to converge"):
        accountant.compose(event.to_dp_event())
    divergence: NDArray[np.float64] = accountant.rdp
    return divergence


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
