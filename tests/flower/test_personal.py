"""Runs with private heads: what travels, what is kept, and what is measured."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict

from fed_dpsat import RunConfig, simulate
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import measured
from fed_dpsat.client.personal import PERSONAL, summarised
from fed_dpsat.flower import client_app as client_app_module
from fed_dpsat.flower.grid import answer
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.simulation.state import StateStore, kept_rounds

CONFIG = RunConfig(
    noise_multiplier=1.0,
    delta=1e-4,
    model="mlp",
    personal_layers="head",
    partition="shards",
    num_clients=4,
    clients_per_round=3,
    num_rounds=2,
    momentum=0.5,
)
BODY = ["1.weight", "1.bias"]


class Clients:
    """Honest clients that note what they were sent and what they said."""

    def __init__(self, config):
        self.messages: list[Message] = []
        experiment = Experiment.build(config)
        self._app = client_app_module.make_client_app(lambda _: experiment)

    def __call__(self, message, context):
        reply = self._app(message, context)
        self.messages += [message, reply]
        return reply


def model_of(folder):
    return torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]


def heads_of(folder, config=CONFIG):
    store, kept = StateStore(folder / "state"), kept_rounds(folder / "state", config.num_rounds)
    return {client: records.load_state(store.load(client, round))[PERSONAL] for client, round in kept.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("personal") / "run"
    return folder, simulate(CONFIG, folder)


@pytest.mark.parametrize("changes", [{}, {"secure_aggregation": True}, {"update_codec": "top-k"}], ids=str)
def test_no_message_holds_a_head_whatever_the_way_to_send(changes, tmp_path):
    config = dataclasses.replace(CONFIG, **changes)
    clients = Clients(config)
    simulate(config, tmp_path / "run", client_app=clients)
    sizes = {"whole": 64 * 128 + 128 + 128 * 10 + 10, "body": 64 * 128 + 128}
    for message in clients.messages:
        for key, record in message.content.array_records.items():
            count = sum(int(np.prod(array.shape)) for array in record.values())
            assert not {"3.weight", "3.bias"} & set(record)
            assert key == records.ARRAYS
            assert count <= sizes["body"] * (0.3 if "indices" in record else 1)
    heads = heads_of(tmp_path / "run", config)
    assert len({float(head["3.weight"].sum()) for head in heads.values()}) == len(heads) >= 3


def test_the_global_model_is_the_shared_part_and_the_initial_head(plain):
    folder, summary = plain
    assert list(model_of(folder)) == BODY
    experiment = Experiment.build(CONFIG)
    whole = experiment.whole(model_of(folder), None)
    assert (
        summary["test_accuracy"]
        == measured(experiment.loss_fn.module, whole, experiment.dataset.test, experiment.task)[0].accuracy
    )


def test_personal_accuracy_is_that_of_the_kept_heads_on_their_shares(plain):
    folder, summary = plain
    experiment, heads = Experiment.build(CONFIG), heads_of(folder)
    found = {}
    for client, share in enumerate(experiment.test_shares):
        state = {PERSONAL: heads[client]} if client in heads else None
        whole = experiment.whole(model_of(folder), state)
        evaluation, _ = measured(
            experiment.loss_fn.module, whole, experiment.dataset.test.rows(torch.from_numpy(share)), experiment.task
        )
        found[client] = evaluation.accuracy
    expected = summarised(found, experiment.task.metrics[0])
    assert {key: summary[key] for key in expected} == expected
    assert expected["personal_clients"] == 4
    last = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert last["personal_accuracy"] == expected["personal_accuracy"]
    assert "label counts" in summary["also_released"][0]


def test_it_costs_what_it_costs_without(plain, tmp_path):
    other = simulate(dataclasses.replace(CONFIG, personal_layers=""), tmp_path / "run")
    assert other["ledger_head"] == plain[1]["ledger_head"]
    assert "personal_accuracy" not in other


def test_a_resumed_run_has_the_bits_of_one_in_one_go(plain, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    rounds = Experiment.client_round
    asked = []

    def killed(self, client, assignment, *args, **kwargs):
        asked.append(client)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return rounds(self, client, assignment, *args, **kwargs)

    monkeypatch.setattr(Experiment, "client_round", killed)
    with pytest.raises(KeyboardInterrupt):
        simulate(CONFIG, folder)
    monkeypatch.undo()
    summary = simulate(dataclasses.replace(CONFIG, resume=True), folder)
    assert all(torch.equal(model_of(folder)[n], p) for n, p in model_of(plain[0]).items())
    assert summary["personal_accuracy"] == plain[1]["personal_accuracy"]
    assert (folder / "rounds.jsonl").read_text() == (plain[0] / "rounds.jsonl").read_text()


@pytest.mark.slow
def test_stacked(plain, tmp_path):
    simulate(dataclasses.replace(CONFIG, stack_clients=3), tmp_path / "run")
    for name, p in model_of(plain[0]).items():
        assert torch.allclose(model_of(tmp_path / "run")[name], p, atol=1e-5)
    for client, head in heads_of(plain[0]).items():
        assert torch.allclose(heads_of(tmp_path / "run")[client]["3.weight"], head["3.weight"], atol=1e-5)


def test_outside_a_simulation_nobody_evaluates():
    """The share of the test split would tell a server of the client's labels."""
    experiment = Experiment.build(CONFIG)
    compat.identify_process()
    app = client_app_module.make_client_app(lambda _: experiment)
    content = RecordDict({records.ARRAYS: records.to_arrays(experiment.shared())})

    def ask(run_id, **node):
        context = Context(
            run_id=run_id, node_id=2, node_config={"partition-id": 0, **node}, state=RecordDict(), run_config={}
        )
        return answer(app, Message(content, 2, MessageType.EVALUATE), context)

    assert ask(compat.SIMULATION_RUN_ID).has_content()
    for reply in (ask(7), ask(compat.SIMULATION_RUN_ID, policy="policy.toml")):
        assert "evaluates in a simulation alone" in reply.error.reason
