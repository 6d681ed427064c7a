"""Flower's own strategies inside ours: which of their settings a run decides itself, and which it refuses.

============================================== ====================================================================
strategy                                       here
============================================== ====================================================================
``fraction_train``, ``min_train_nodes``,       overruled: ``clients_per_round``, ``client_sampling`` and
``min_available_nodes``                        ``min_clients`` say who is asked, which is what is charged
``fraction_evaluate``, ``min_evaluate_nodes``, overruled: no client is asked to evaluate
``evaluate_metrics_aggr_fn``
``DifferentialPrivacyClientSide...``           refused: no client clips for it, so its noise covers nothing
``DifferentialPrivacyServerSide...``           refused: its noise is numpy's global one, and no ledger charges it
============================================== ====================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from logging import getLogger

from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)

from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig

log = getLogger("fed_dpsat")

CLIENT_SIDE = (DifferentialPrivacyClientSideFixedClipping, DifferentialPrivacyClientSideAdaptiveClipping)
SERVER_SIDE = (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyServerSideAdaptiveClipping)
DECIDED = {
    "fraction_train": 1.0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
    "fraction_evaluate": 0.0,
    "min_evaluate_nodes": 0,
}
"""Attributes of ``FedAvg`` and its kind as they are in every run."""


def check(strategy: Strategy) -> None:
    """Raise ``SettingError`` for a privacy wrapper of Flower's, also inside another strategy."""
    for one in _nested(strategy):
        if isinstance(one, CLIENT_SIDE + SERVER_SIDE):
            why = (
                "one whose noise protects anything here, because no client clips its change for it"
                if isinstance(one, CLIENT_SIDE)
                else "one whose noise a ledger counts: it comes from numpy's global generator, and the bound is on all "
                "arrays of a reply, counters included"
            )
            inner = type(one.strategy).__name__
            raise SettingError(
                "strategy", type(one).__name__, why, f"give {inner} itself, and privacy_unit=client for such a bound"
            )


def take_over(strategy: Strategy) -> None:
    """A stock strategy samples by fraction and waits for a minimum; the cohort is drawn here, so it takes all."""
    for one in _nested(strategy):
        if isinstance(one, FedAvg):
            vars(one).update(DECIDED)


def say_overruled(strategy: Strategy, config: RunConfig) -> None:
    """Log in one line what of ``strategy``'s own settings, before ``take_over``, ``config`` overrules."""
    usual = vars(FedAvg())
    ours = {"fraction_train": config.client_rate, "min_available_nodes": config.min_clients}
    overruled = [
        f"{name}={vars(one)[name]!r}"
        for one in _nested(strategy)
        if isinstance(one, FedAvg)
        for name, decided in {**DECIDED, "evaluate_metrics_aggr_fn": None}.items()
        if vars(one).get(name, decided) not in (usual[name], decided, ours.get(name))
    ]
    if overruled:
        log.warning(
            "strategy: %s of %s has no effect: clients_per_round=%d, client_sampling=%s and min_clients=%d say who is "
            "asked (of %d clients, %g a round), and no client is asked to evaluate",
            ", ".join(overruled),
            type(strategy).__name__,
            config.clients_per_round,
            config.client_sampling,
            config.min_clients,
            config.num_clients,
            config.cohort_size,
        )


def _nested(strategy: Strategy) -> Iterator[Strategy]:
    """``strategy``, and those that it holds."""
    found, waiting = set[int](), [strategy]
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found.add(id(one))
            yield one
            waiting += [value for value in getattr(one, "__dict__", {}).values() if isinstance(value, Strategy)]
