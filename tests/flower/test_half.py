"""Runs with a client's half: what travels, what is charged, what a judge refuses, and the same bits after a kill."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg

from fed_dpsat import RunConfig, simulate
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.half import ClientHalf, with_half
from fed_dpsat.errors import InputError, SettingError
from fed_dpsat.flower import client_app as client_app_module
from fed_dpsat.flower.federation import build_strategy, private_strategy
from fed_dpsat.flower.wire import codec, records
from fed_dpsat.params import Params
from strategies.ditto import Ditto

CONFIG = RunConfig(
    noise_multiplier=1.0,
    delta=1e-4,
    accountant="rdp",
    model="mlp",
    partition="shards",
    num_clients=4,
    clients_per_round=3,
    num_rounds=2,
    strategy="dp-scaffold",
)


class Clients:
    """Honest clients that note what they were sent and what they said; ``spoil`` changes a reply."""

    def __init__(self, config, spoil=lambda client, content: None):
        self.asked: list[Message] = []
        self.said: list[Message] = []
        experiment = Experiment.build(with_half(config))
        self._app, self._spoil = client_app_module.make_client_app(lambda _: experiment), spoil

    def __call__(self, message, context):
        reply = self._app(message, context)
        if records.ASSIGNMENT in message.content:
            self._spoil(int(context.node_config[records.PARTITION_ID]), reply.content)
            self.asked.append(message)
            self.said.append(reply)
        return reply


def model_of(folder) -> Params:
    return torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], p) for name, p in b.items())


def test_a_record_is_declared_in_the_message_sent_and_counted_in_bytes(tmp_path, untried):
    clients = Clients(CONFIG)
    simulate(CONFIG, tmp_path / "run", client_app=clients)
    shapes = {name: tuple(p.shape) for name, p in model_of(tmp_path / "run").items()}
    for message, reply in zip(clients.asked, clients.said, strict=True):
        declared = records.read_sends(message.content)
        assert {name: form.shape for name, form in declared["control"].items()} == shapes
        assert set(reply.content.array_records) == {"arrays", "control"}
    of_model = sum(p.nbytes for p in model_of(tmp_path / "run").values())
    assert codec.num_bytes(clients.said[0].content) == 2 * of_model
    timing = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert [line["bytes_up"] for line in timing[1:]] == [3 * 2 * of_model] * 2


def rewrite(content, change):
    content["control"] = change({name: a.numpy() for name, a in content["control"].items()})


def as_record(arrays):
    return ArrayRecord({name: client_app_module.compat.Array(a) for name, a in arrays.items()})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c.pop("control"), "array records ['arrays'], expected 'arrays', 'control' alone"),
        (lambda c: c.update({"more": c["control"]}), "array records ['arrays', 'control', 'more']"),
        (
            lambda c: rewrite(c, lambda a: as_record({n: v[:1] for n, v in a.items()})),
            "control: 1.weight is float32[1, 64], not float32[128, 64]",
        ),
        (
            lambda c: rewrite(c, lambda a: as_record({n: v.astype(np.float64) for n, v in a.items()})),
            "control: 1.weight is float64",
        ),
        (lambda c: rewrite(c, lambda a: as_record({n: v * np.nan for n, v in a.items()})), "control: 1.weight has NaN"),
        (lambda c: rewrite(c, lambda a: as_record({"w": a["1.bias"]})), "control: other parameters"),
    ],
)
def test_the_judge_refuses_what_was_not_declared(spoil, said, tmp_path, untried):
    config = dataclasses.replace(CONFIG, clients_per_round=0)
    clients = Clients(config, lambda client, content: spoil(content) if client == 1 else None)
    simulate(config, tmp_path / "run", client_app=clients)
    dropped = lines_of(tmp_path / "run")[1]["dropped"]
    assert dropped.keys() == {"1"}
    assert said in dropped["1"]
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite", readonly=True) as ledger:
        assert ledger.rounds_by_client()[1] == 2  # what was asked stays charged


def test_the_control_variate_of_the_server_is_the_mean_of_those_of_all_clients(tmp_path, untried):
    kept: dict[int, Params] = {}

    def note(client, content):
        change = {name: torch.from_numpy(a.numpy()) for name, a in content["control"].items()}
        kept[client] = {name: c + kept[client][name] if client in kept else c for name, c in change.items()}

    clients = Clients(CONFIG, note)
    simulate(dataclasses.replace(CONFIG, num_rounds=3), tmp_path / "run", client_app=clients)
    last = clients.asked[-1].content["control"]
    before = dict(kept)
    for reply in clients.said[-3:]:
        client = int(reply.content[records.EVENT]["client"])
        change = {name: torch.from_numpy(a.numpy()) for name, a in reply.content["control"].items()}
        before[client] = {name: c - change[name] for name, c in kept[client].items()}
    mean = {name: sum(c[name] for c in before.values()) / CONFIG.num_clients for name in before[client]}
    assert all(np.allclose(last[name].numpy(), m.numpy(), atol=1e-6) for name, m in mean.items())


SLOW = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["ditto", pytest.param("mr-mtl", marks=SLOW), "dp-scaffold"])
def test_a_resumed_run_has_the_bits_of_one_in_one_go(strategy, tmp_path, monkeypatch, untried):
    config = dataclasses.replace(CONFIG, strategy=strategy, momentum=0.5)
    whole = simulate(config, tmp_path / "whole")
    rounds, asked = Experiment.client_round, []

    def killed(self, client, assignment, *args, **kwargs):
        asked.append(client)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return rounds(self, client, assignment, *args, **kwargs)

    monkeypatch.setattr(Experiment, "client_round", killed)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run")
    monkeypatch.undo()
    summary = simulate(dataclasses.replace(config, resume=True), tmp_path / "run")
    assert equal(model_of(tmp_path / "run"), model_of(tmp_path / "whole"))
    assert summary["ledger_head"] == whole["ledger_head"]
    assert summary.get("personal_accuracy") == whole.get("personal_accuracy")
    assert ("personal_accuracy" in whole) == (strategy != "dp-scaffold")


def test_ditto_is_charged_as_twice_the_steps(tmp_path, untried):
    ditto = simulate(dataclasses.replace(CONFIG, strategy="ditto", local_steps=2), tmp_path / "ditto")
    twice = simulate(dataclasses.replace(CONFIG, strategy="fedavg", local_steps=4), tmp_path / "twice")
    assert ditto["epsilon"] == twice["epsilon"]
    assert ditto["local_steps"] == 4
    assert ditto["ledger_head"] == twice["ledger_head"]


def test_a_strategy_given_as_an_object_brings_its_half(tmp_path, untried):
    named = simulate(dataclasses.replace(CONFIG, strategy="ditto", strategy_args="mu = 0.2"), tmp_path / "named")
    given = simulate(dataclasses.replace(CONFIG, strategy="fedavg"), tmp_path / "given", strategy=Ditto(mu=0.2))
    assert equal(model_of(tmp_path / "named"), model_of(tmp_path / "given"))
    assert named["personal_accuracy"] == given["personal_accuracy"]


def test_masks_hide_what_a_half_of_one_model_sends_and_records_are_refused(tmp_path):
    masked = {"secure_aggregation": True, "num_rounds": 1, "clients_per_round": 0}
    found = [
        simulate(dataclasses.replace(CONFIG, strategy="mr-mtl", **{**masked, **changes}), tmp_path / str(i))
        for i, changes in enumerate([{}, {"secure_aggregation": False}])
    ]
    assert found[0]["personal_accuracy"] == found[1]["personal_accuracy"]
    with pytest.raises(SettingError, match="strategy='DPScaffold' is not one that uses only the mean"):
        simulate(dataclasses.replace(CONFIG, **masked), tmp_path / "records")


def test_a_server_on_a_network_says_what_its_clients_have_to_know():
    """Clients of a network read the settings alone, and load a strategy only if these say that it has a half."""
    experiment = Experiment.build(dataclasses.replace(CONFIG, strategy="ditto"))
    with PrivacyLedger(":memory:") as ledger, pytest.raises(SettingError, match="set local_models=2"):
        private_strategy(experiment, build_strategy(experiment.config), ledger, [])


class Fails(FedAvg):
    class Half(ClientHalf):
        def correct(self, model, private_gradient, params, received, state):
            raise ValueError("a mistake")

    def __init__(self):
        super().__init__()
        self.client_half = self.Half()


def test_a_half_that_fails_does_so_before_any_charge_and_is_named(tmp_path):
    said = r"strategy.*fails on made-up examples.*correct: ValueError: a mistake.*\(nothing was charged\)"
    with pytest.raises(InputError, match=said):
        simulate(dataclasses.replace(CONFIG, strategy="fedavg"), tmp_path / "run", strategy=Fails())
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


def test_a_message_without_the_record_that_a_half_receives_is_refused():
    experiment = Experiment.build(with_half(CONFIG))
    like = experiment.half.receives(experiment.shared())
    content = records.RecordDict({"control": records.to_arrays({n: p[:1] for n, p in experiment.shared().items()})})
    with pytest.raises(records.RecordError, match="no 'control' from the strategy"):
        records.read_received(records.RecordDict(), like, lambda c, key: None)
    with pytest.raises(records.RecordError, match="other arrays than the client's half receives"):
        records.read_received(content, like, lambda c, key: records.to_params(c[key]))
