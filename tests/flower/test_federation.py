"""The server's side: which strategies it takes, and what it warns about."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedAvg

from fed_dpsat.flower.federation import build_strategy
from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

SMALL = RunConfig(num_clients=3, num_rounds=2, sample_rate=0.5, noise_multiplier=200.0, lr=0.25, evaluate_every=2)


def named(strategy):
    return RunConfig(noise_multiplier=1.0, strategy=strategy)


def test_a_built_in_a_stock_and_a_file(tmp_path):
    assert isinstance(build_strategy(named("fedavg")), FedAvg)
    assert type(build_strategy(named("flwr.serverapp.strategy:FedYogi"))).__name__ == "FedYogi"
    (tmp_path / "mine.py").write_text("from flwr.serverapp.strategy import Krum\ndef build(seed):\n    return Krum()\n")
    assert type(build_strategy(named(f"{tmp_path}/mine.py:build"))).__name__ == "Krum"


def test_what_is_no_strategy_is_refused():
    with pytest.raises(PluginError, match="is a Fraction; return a strategy of"):
        build_strategy(named("fractions:Fraction"))
    with pytest.raises(PluginError, match="wrap it in one"):
        build_strategy(named("builtins:dict"))


def test_a_wrong_name_lists_the_near_ones():
    with pytest.raises(PluginError, match="did you mean fedavg"):
        build_strategy(named("fedavgg"))


def lines(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def model(folder):
    return torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]


def test_movement_and_its_noise_are_in_every_round(tmp_path):
    first = dataclasses.replace(SMALL, num_rounds=1)
    simulate(first, tmp_path / "one")
    simulate(SMALL, tmp_path / "two")
    before, one, two = lines(tmp_path / "two")
    moved = [model(tmp_path / "two")[name] - p for name, p in model(tmp_path / "one").items()]
    assert before["update_norm"] is before["noise_norm"] is None
    assert two["update_norm"] == pytest.approx(math.sqrt(sum(float(m.square().sum()) for m in moved)), rel=1e-5)
    # sqrt(d K) lr z C / (rate N): K clients of N examples together, d parameters, where noise is nearly all there is
    expected = math.sqrt(650 * 3) * 0.25 * 200.0 * 0.5 / (0.5 * 1437)
    assert two["noise_norm"] == pytest.approx(expected)
    assert two["update_norm"] == pytest.approx(expected, rel=0.15)
    assert one["update_norm"] == lines(tmp_path / "one")[1]["update_norm"]


@pytest.mark.parametrize(
    ("changes", "objects"),
    [
        ({"strategy": "flwr.serverapp.strategy:FedMedian"}, {}),
        ({"momentum": 0.9}, {}),
        ({}, {"strategy": FedAdam(eta=0.02)}),
        ({"attack": "sign-flip", "attackers": 0.4}, {}),
    ],
)
def test_noise_of_a_step_that_is_no_mean_of_sgd_steps_is_not_claimed(tmp_path, changes, objects):
    simulate(dataclasses.replace(SMALL, num_rounds=1, **changes), tmp_path / "run", **objects)
    line = lines(tmp_path / "run")[1]
    assert line["noise_norm"] is None
    assert line["update_norm"] > 0


def test_quality_is_that_of_the_last_evaluated_model_and_holdings_are_there(tmp_path):
    summary = simulate(SMALL, tmp_path / "run")
    quality = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert (quality["round"], quality["num_examples"]) == (2, 360)
    assert quality["accuracy"] == summary["test_accuracy"]
    assert quality["nll"] == pytest.approx(summary["test_loss"], rel=1e-5)
    assert quality["measured_on"] == "public test split of digits"
    held = json.loads((tmp_path / "run" / "simulation.json").read_text())
    assert [sum(counts) for counts in held["label_counts"]] == held["sizes"] == [479] * 3
    assert np.sum(held["label_counts"], axis=0).min() > 100


def test_noise_of_a_trusted_server_is_its_own(tmp_path):
    config = dataclasses.replace(SMALL, num_rounds=1, privacy_unit="client", client_sampling="poisson", delta=1e-2)
    simulate(config, tmp_path / "run")
    expected = math.sqrt(650) * 200.0 * 0.5 / 3  # sqrt(d) z C over the expected size of a cohort
    assert lines(tmp_path / "run")[1]["noise_norm"] == pytest.approx(expected)
    assert lines(tmp_path / "run")[1]["update_norm"] == pytest.approx(expected, rel=0.15)


def test_quality_on_validation_examples_is_not_said_to_be_on_public_ones(tmp_path):
    simulate(dataclasses.replace(SMALL, num_rounds=1, validation_share=0.1), tmp_path / "run")
    quality = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert "public" not in quality["measured_on"]
    assert "validation" in quality["measured_on"]
