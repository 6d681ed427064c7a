"""A tiny federation: four clients, two parameters, replies made by the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import ClientPlan
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.strategy import PrivateStrategy
from fed_dpsat.flower.wire import records
from fed_dpsat.simulation.in_process import InProcessBackend

NUM_CLIENTS = 4
EVENT = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=2)


def plans(**changes: object) -> list[ClientPlan]:
    plan = ClientPlan(target_epsilon=0.0, first_round=1, event=EVENT)
    return [dataclasses.replace(plan, **changes)] * NUM_CLIENTS


Tamper = Callable[[int, int, RecordDict], RecordDict]


def honest_content(client: int, assigned_round: int) -> RecordDict:
    """Client c moves both parameters to c + round; it declares c + 1 examples."""
    return RecordDict(
        {
            records.ARRAYS: records.to_arrays({"w": torch.full((2,), float(client + assigned_round))}),
            records.EVENT: ConfigRecord({"client": client, "round": assigned_round, "attempt": 0, **EVENT.to_dict()}),
            records.METRICS: MetricRecord({records.NUM_EXAMPLES: client + 1}),
        }
    )


def client_app(tamper: Tamper | None = None, identity: Callable[[int], int] = lambda c: c) -> ClientApp:
    app = ClientApp()

    @app.query()
    def identify(message: Message, context: Context) -> Message:
        return Message(
            records.identity_content(identity(int(context.node_config["partition-id"])), 1), reply_to=message
        )

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, assignment = int(context.node_config["partition-id"]), records.read_assignment(message.content)
        content = honest_content(client, assignment.round)
        return Message(tamper(client, assignment.round, content) if tamper else content, reply_to=message)

    return app


class Federation:
    """A strategy on a grid, and what it leaves."""

    def __init__(self, ledger: PrivacyLedger, tamper: Tamper | None = None, **settings: object) -> None:
        self.ledger = ledger
        self.models: list[np.ndarray] = []
        self.reports = []
        self.grid = SimulationGrid(InProcessBackend(client_app(tamper), {}, NUM_CLIENTS), NUM_CLIENTS)
        defaults = {
            "plans": plans(), "delta": 1e-5, "accountant": "pld", "cohort_size": NUM_CLIENTS,
            "max_rounds_per_client": 100, "seed": 0, "join_timeout": 0.0, "inner": FedAvg(),
        }  # fmt: skip
        merged = {**defaults, **settings}
        self.strategy = PrivateStrategy(merged.pop("inner"), ledger, **merged)

    def run(self, rounds: int = 1) -> Federation:
        def keep(server_round: int, arrays) -> None:
            self.models.append(arrays["w"].numpy())
            self.reports.append(self.strategy.report)

        self.strategy.start(self.grid, records.to_arrays({"w": torch.zeros(2)}), rounds, evaluate_fn=keep)
        return self


@pytest.fixture
def ledger(tmp_path) -> Iterator[PrivacyLedger]:
    with PrivacyLedger(tmp_path / "ledger.sqlite") as opened:
        yield opened


@pytest.fixture
def federation(ledger: PrivacyLedger) -> Callable[..., Federation]:
    return lambda tamper=None, **settings: Federation(ledger, tamper, **settings)


@pytest.fixture
def make_client_app() -> Callable[..., ClientApp]:
    return client_app


@pytest.fixture
def make_plans() -> Callable[..., list[ClientPlan]]:
    return plans
