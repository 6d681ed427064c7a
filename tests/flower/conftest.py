"""A tiny federation: four clients, two parameters, replies made by the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import ClientPlan
from fed_dpsat.testing import federation as testing

NUM_CLIENTS = 4


def plans(**changes: object) -> list[ClientPlan]:
    return [dataclasses.replace(testing.PLAN, **changes)] * NUM_CLIENTS


def to_client_plus_round(client, round, model):
    return {name: np.full_like(array, client + round) for name, array in model.items()}


class Federation(testing.Federation):
    """Client c moves both parameters to c + round and declares c + 1 examples; what a strategy on a grid leaves."""

    def __init__(self, ledger, tamper=None, *, inner=None, cohort_size=NUM_CLIENTS, **settings) -> None:
        super().__init__(
            inner or FedAvg(),
            move=to_client_plus_round,
            tamper=tamper,
            cohort_size=cohort_size,
            model={"w": np.zeros(2, dtype=np.float32)},
            ledger=ledger,
            num_clients=NUM_CLIENTS,
            **{"accountant": "pld", **settings},
        )
        self.strategy, self.models, self.reports = self.private, [], []

    def run(self, rounds: int = 1) -> Federation:
        def keep(server_round: int, arrays) -> None:
            self.models.append(arrays["w"].numpy())
            self.reports.append(self.strategy.report)

        self.strategy.start(self.grid, self.model, rounds, evaluate_fn=keep)
        return self


@pytest.fixture
def ledger(tmp_path) -> Iterator[PrivacyLedger]:
    with PrivacyLedger(tmp_path / "ledger.sqlite") as opened:
        yield opened


@pytest.fixture
def federation(ledger: PrivacyLedger) -> Callable[..., Federation]:
    return lambda tamper=None, **settings: Federation(ledger, tamper, **settings)


@pytest.fixture
def make_client_app(ledger) -> Callable[..., ClientApp]:
    answer = Federation(ledger)._answer
    return lambda identity=lambda client: client: testing.client_app(answer, identity)


@pytest.fixture
def make_plans() -> Callable[..., list[ClientPlan]]:
    return plans
