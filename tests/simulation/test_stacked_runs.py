"""Whole runs with stacked clients: the charges and lines of the same run unstacked, its model to 1e-5."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.client.build import Experiment
from fed_dpsat.params import global_norm, subtract
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.simulation.host import Host

CONFIG = RunConfig(
    noise_multiplier=2.0, delta=1e-4, num_clients=10, clients_per_round=7, num_rounds=3, local_steps=2, momentum=0.5
)
STACKED = dataclasses.replace(CONFIG, stack_clients=3)


def left_by(config, folder):
    """Model, ledger, and lines of the rounds but for times."""
    simulate(config, folder)
    with PrivacyLedger(folder / "ledger.sqlite") as ledger:
        charges = ledger.epsilon(1e-4), ledger.histories()
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    model = torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]
    return model, charges, [{k: r[k] for k in ("round", "asked", "epsilon")} for r in lines]


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    return left_by(STACKED, tmp_path_factory.mktemp("runs") / "stacked")


def test_the_same_charges_and_lines_and_the_model_within_1e_5(stacked, tmp_path):
    model, charges, lines = left_by(CONFIG, tmp_path / "single")
    assert (charges, lines) == stacked[1:]
    assert global_norm(subtract(stacked[0], model)) <= 1e-5 * global_norm(model)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bits_on_ray(stacked, tmp_path, ray_cluster, workers, same_bits):
    model, charges, lines = left_by(dataclasses.replace(STACKED, workers=workers), tmp_path / "ray")
    assert same_bits(model, stacked[0])
    assert (charges, lines) == stacked[1:]


def test_a_client_that_fails_takes_no_other_down(tmp_path, monkeypatch, caplog):
    """Client 4's data cannot be read; whoever is in its stack replies all the same."""
    member = Experiment._member

    def broken(self, request):
        if request.client == 4:
            raise OSError("the disk of client 4")
        return member(self, request)

    monkeypatch.setattr(Experiment, "_member", broken)
    config = dataclasses.replace(STACKED, clients_per_round=0, num_rounds=1)
    simulate(config, tmp_path / "run")
    *_, line = (json.loads(text) for text in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines())
    assert "the disk of client 4" in json.dumps(line)
    assert "the disk of client 4" in caplog.text
    assert line["accepted"] == 9


def test_what_cannot_be_stacked_trains_one_after_the_other_and_says_so(tmp_path, caplog, same_bits):
    adaptive = dataclasses.replace(CONFIG, clipping="adaptive", num_rounds=1)
    model, *_ = left_by(adaptive, tmp_path / "single")
    other, *_ = left_by(dataclasses.replace(adaptive, stack_clients=7), tmp_path / "stacked")
    assert same_bits(model, other)
    assert "stack_clients: clients train one after the other: adaptive clipping" in caplog.text


def test_secure_aggregation_stays_masked_client_by_client(tmp_path, caplog, same_bits):
    """A stack that sent parameters unmasked would be refused, or would change the sum."""
    secure = dataclasses.replace(CONFIG, secure_aggregation=True, num_rounds=1)
    model, *_ = left_by(secure, tmp_path / "single")
    other, *_ = left_by(dataclasses.replace(secure, stack_clients=7), tmp_path / "stacked")
    assert same_bits(model, other)
    assert "clients train one after the other: secure aggregation" in caplog.text


def test_updates_are_encoded_alike(tmp_path):
    coded = dataclasses.replace(CONFIG, update_codec="bf16", num_rounds=1)
    model, *_ = left_by(coded, tmp_path / "single")
    other, *_ = left_by(dataclasses.replace(coded, stack_clients=7), tmp_path / "stacked")
    assert global_norm(subtract(other, model)) <= 1e-3 * global_norm(model)


def test_clients_that_come_later_train_together_too(tmp_path, monkeypatch):
    """Their states have another form than those of clients that come again."""
    config = dataclasses.replace(CONFIG, clients_per_round=4, num_rounds=4)
    expected, *_ = left_by(config, tmp_path / "alone")
    whole = []
    together = Host._together
    monkeypatch.setattr(Host, "_together", lambda self, *given: whole.append(together(self, *given)) or whole[-1])
    found, *_ = left_by(dataclasses.replace(config, stack_clients=4), tmp_path / "stacked")
    assert len(whole) == 4
    assert None not in whole
    assert max(float((found[name] - p).abs().max()) for name, p in expected.items()) < 1e-5
