"""Secure aggregation over messages: the same model as in the open, whoever goes when, and nothing else to see."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fed_dpsat import RunConfig, simulate
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.flower import client_app as client_app_module
from fed_dpsat.flower.wire import records
from fed_dpsat.flower.wire.records import SECURE
from fed_dpsat.secagg import client as secure_client
from fed_dpsat.simulation import simulation_grid
from fed_dpsat.simulation.state import StateStore, kept_rounds

pytestmark = pytest.mark.usefixtures("untried")  # the trial has tests of its own: tests/client/test_trial.py

CONFIG = RunConfig(num_clients=6, num_rounds=2, noise_multiplier=1.0, delta=1e-4, local_steps=2)
SECRET = dataclasses.replace(CONFIG, secure_aggregation=True)


ASSIGNMENT = Assignment(
    round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=CONFIG.sample_rate, steps=CONFIG.local_steps)
)


class Clients:
    """Honest clients that note what they send; those of ``gone`` (client to phase) fail from that phase on."""

    phases = ("keys", "shares", "masked", "open")

    def __init__(self, config: RunConfig, gone: dict[int, str] | None = None) -> None:
        self.sent: list[Message] = []
        self._gone = gone or {}
        experiment = Experiment.build(config)
        self._app = client_app_module.make_client_app(lambda _: experiment)

    def __call__(self, message, context):
        secure = message.content.config_records.get(SECURE)
        client = int(context.node_config["partition-id"])
        last = self._gone.get(client)
        if secure and last and self.phases.index(secure["phase"]) >= self.phases.index(last):
            raise RuntimeError("switched off")
        self.sent.append(reply := self._app(message, context))
        return reply


def run(config: RunConfig, folder, gone=None):
    clients = Clients(config, gone)
    summary = simulate(config, folder, client_app=clients)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return summary, lines, clients, torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]


def apart(a, b) -> float:
    assert a.keys() == b.keys() == {"1.weight", "1.bias"}
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_the_model_and_the_ledger_are_those_of_a_run_in_the_open(tmp_path):
    hidden, lines, clients, model = run(SECRET, tmp_path / "hidden")
    plain, _, _, open_model = run(CONFIG, tmp_path / "open")
    assert apart(model, open_model) < 1e-5
    assert hidden["epsilon"] == plain["epsilon"]
    assert hidden["ledger_head"] == plain["ledger_head"]
    assert [line["accepted"] for line in lines[1:]] == [6, 6]
    assert len(clients.sent) == 2 * 4 * 6


def test_no_message_holds_a_model_that_tells(tmp_path):
    """All numbers that leave are 64 bits of noise: half of them are ones, in every message."""
    _, _, clients, _ = run(SECRET, tmp_path / "hidden")
    arrays = [a for m in clients.sent for r in m.content.array_records.values() for a in r.values()]
    assert len(arrays) == 12
    for array in arrays:
        values = array.numpy()
        assert values.dtype == np.uint64
        assert np.unpackbits(values.view(np.uint8)).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.by_default("gone0-*", "gone3-*", "gone4-*")
@pytest.mark.parametrize(
    ("gone", "accepted"),
    [
        ({1: "keys"}, 5),
        ({1: "shares"}, 5),
        ({1: "masked"}, 5),
        ({1: "masked", 4: "shares"}, 0),
        ({1: "open"}, 6),
    ],
)
def test_clients_may_go_at_any_point(gone, accepted, tmp_path):
    """A threshold of 0.67 of six is five. One who goes after sending is in the sum."""
    config = dataclasses.replace(SECRET, num_rounds=1)
    summary, lines, _, model = run(config, tmp_path / "hidden", gone)
    assert lines[1]["accepted"] == accepted
    assert summary["rounds_completed"] == 1
    assert lines[1]["epsilon"] > 0
    if accepted:
        assert apart(model, mean_of([c for c in range(6) if accepted == 6 or c not in gone], config)) < 1e-5
    else:
        assert lines[1]["kept_model"]
        assert "secure aggregation: 4 clients" in next(iter(lines[1]["dropped"].values()))


class Liar(Clients):
    """Client 1 says under its mask that it took one step, where two were charged."""

    def __call__(self, message, context):
        reply = super().__call__(message, context)
        if int(context.node_config["partition-id"]) == 1 and message.content[SECURE]["phase"] == "masked":
            reply.content[records.EVENT].update({"steps": 1})
        return reply


def test_a_masked_reply_that_is_not_valid_is_not_in_the_sum(tmp_path):
    config = dataclasses.replace(SECRET, num_rounds=1)
    simulate(config, tmp_path, client_app=Liar(config))
    line = json.loads((tmp_path / "rounds.jsonl").read_text().splitlines()[-1])
    assert "is not the one that was charged" in line["dropped"]["1"]
    model = torch.load(tmp_path / "checkpoint" / "model.pt", weights_only=True)["params"]
    assert apart(model, mean_of([0, 2, 3, 4, 5], config)) < 1e-5


def mean_of(clients, config):
    experiment = Experiment.build(config)
    params = {n: p.detach() for n, p in experiment.loss_fn.module.named_parameters()}
    sizes = [len(experiment.partitions[c]) for c in clients]
    results = [experiment.client_round(c, ASSIGNMENT, params, None).params for c in clients]
    return {n: sum(s * r[n].double() for s, r in zip(sizes, results, strict=True)) / sum(sizes) for n in params}


def test_what_a_client_keeps_between_phases_can_be_read_from_a_file(tmp_path):
    """As on Ray, where any worker may be asked the next question."""
    state = RecordDict()
    question = {"phase": "keys"}
    content = RecordDict({records.ASSIGNMENT: records.assignment_record(ASSIGNMENT), SECURE: ConfigRecord(question)})
    secure_client.phase_reply(0, content, state, 10)
    StateStore(tmp_path).save(0, 1, state, None)
    assert StateStore(tmp_path).load(0, 1) == state


def test_several_questions_of_a_round_leave_the_state_of_the_one_before(tmp_path):
    store = StateStore(tmp_path)
    for round, before in ((1, None), (2, 1), (2, 2), (2, 2)):
        store.save(0, round, RecordDict({"n": ConfigRecord({"round": round})}), before)
    assert kept_rounds(tmp_path, up_to=1) == {0: 1}


def test_a_strategy_that_looks_at_single_replies_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"GeometricMedian.*secure_aggregation hides them"):
        simulate(dataclasses.replace(SECRET, strategy="geometric-median"), tmp_path / "run")


def test_two_hide_nobody():
    with pytest.raises(SettingError, match="3 or more hide each other"):
        RunConfig(num_clients=2, noise_multiplier=1.0, secure_aggregation=True)


@pytest.mark.parametrize("secure", [True, False])
def test_a_client_that_expects_the_other_sends_nothing(secure, tmp_path):
    """A server that leaves secure aggregation out gets no model in the open."""
    other = Clients(dataclasses.replace(SECRET, secure_aggregation=not secure))
    with pytest.raises(Exception, match="do not agree on secure_aggregation"):
        simulate(dataclasses.replace(SECRET, secure_aggregation=secure), tmp_path / "run", client_app=other)
    assert not [m for m in other.sent if m.has_content() and m.content.array_records]


def test_an_update_is_sent_once_under_a_mask():
    with simulation_grid(Experiment.build(dataclasses.replace(SECRET, num_rounds=1))) as grid:
        asked = Asked(grid)
        again = asked.masked(asked.until_masked())
        assert "two under one mask" in again[0].error.reason


def test_shares_are_opened_once():
    """A second question, with other clients said to have arrived, would give the server both secrets of one."""
    with simulation_grid(Experiment.build(dataclasses.replace(SECRET, num_rounds=1))) as grid:
        asked = Asked(grid)
        first = asked.until_open(arrived=[0, 1, 2, 3, 4])
        assert first.has_content()
        again = asked.open(arrived=[0, 1, 2, 3, 5])
        assert "has replied already" in again.error.reason


class Asked:
    """Goes through the phases of one round by hand."""

    def __init__(self, grid) -> None:
        self.grid = grid
        self.nodes = list(grid.get_node_ids())
        self.assignment = records.assignment_record(ASSIGNMENT)
        params = records.to_arrays(
            {n: p.detach() for n, p in Experiment.build(SECRET).loss_fn.module.named_parameters()}
        )
        self.model: ArrayRecord = params

    def ask(self, questions):
        return list(
            self.grid.send_and_receive(
                Message(
                    RecordDict(
                        {records.ASSIGNMENT: self.assignment, records.ARRAYS: self.model, SECURE: ConfigRecord(q)}
                    ),
                    node,
                    MessageType.TRAIN,
                )
                for node, q in zip(self.nodes, questions, strict=False)
            )
        )

    def until_open(self, arrived):
        self.until_masked()
        return self.open(arrived)

    def until_masked(self):
        keys = [r.content[SECURE] for r in self.ask([{"phase": "keys"}] * 6)]
        listed = {"clients": list(range(6)), "seal": [k["seal"] for k in keys], "mask": [k["mask"] for k in keys]}
        shares = [r.content[SECURE] for r in self.ask([{"phase": "shares", "threshold": 5, **listed}] * 6)]
        assert all(reply.has_content() for reply in self.masked(shares))
        return shares

    def masked(self, shares):
        return self.ask(
            [
                {
                    "phase": "masked",
                    "clients": list(range(6)),
                    "sealed": [s["sealed"][client] for s in shares],
                    "total_examples": 1437.0,
                }
                for client in range(6)
            ]
        )

    def open(self, arrived):
        return self.ask([{"phase": "open", "arrived": arrived}])[0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1])
def test_ray_workers_agree_with_one_process(workers, tmp_path):
    here, there = (simulate(dataclasses.replace(SECRET, workers=w), tmp_path / str(w)) for w in (0, workers))
    assert there["test_loss"] == here["test_loss"]
