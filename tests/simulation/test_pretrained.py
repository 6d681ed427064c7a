"""Runs from pre-trained weights: what is frozen stays and is not sent; runs resume on either side of the switch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from typer.testing import CliRunner

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.cli import app
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import measured
from fed_dpsat.errors import SettingError
from fed_dpsat.models.mlp import mlp
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

HIGH = "simulations.digit_halves:high"
HEAD = {"3.weight", "3.bias"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run folder of digits 0 to 4, learnt without noise, by the command line."""
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    result = CliRunner().invoke(app, ["run", "simulations/pretrain_digits.toml", "--out", str(out), "--json"])
    summary = json.loads(result.stdout)
    assert summary["epsilon"] == "inf"
    assert summary["test_accuracy"] >= 0.97
    return out


@pytest.fixture
def config(pretrained):
    return RunConfig(
        dataset=HIGH, model="mlp", start_from=str(pretrained), start_head="new", train_layers="head",
        num_clients=4, num_rounds=4, noise_multiplier=1.0, delta=1e-3, lr=4.0, momentum=0.5, local_steps=2,
    )  # fmt: skip


def saved(folder):
    return torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]


def lines(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def bits(params):
    return {name: p.numpy().tobytes() for name, p in params.items()}


def test_the_body_alone_is_loaded_and_the_head_alone_is_trained(config, pretrained):
    experiment = Experiment.build(config)
    body = {n: p for n, p in experiment.loss_fn.module.state_dict().items() if n not in HEAD}
    assert bits(body) == bits({n: p for n, p in saved(pretrained).items() if n not in HEAD})
    assert experiment.trained(1).keys() == HEAD
    fresh = Experiment.build(dataclasses.replace(config, start_from="", start_head="loaded"))
    assert bits(experiment.trained(1)) == bits(fresh.trained(1))


@pytest.mark.parametrize("engine", ["auto", "planned", "opacus"])
def test_every_engine_trains_the_head_alone(config, engine):
    assignment, start = (
        Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=2)),
        Experiment.build(config).trained(1),
    )
    ours, reference = (
        Experiment.build(dataclasses.replace(config, engine=name)).client_round(0, assignment, start, None)
        for name in (engine, "vmap")
    )
    assert ours.params.keys() == HEAD
    for name, p in reference.params.items():
        torch.testing.assert_close(ours.params[name], p, rtol=1e-4, atol=1e-5)


def test_noise_and_bound_are_those_of_the_head(config):
    """With gradients of zero, one step of the head is noise alone: as many normals as it has coordinates."""
    experiment = Experiment.build(dataclasses.replace(config, momentum=0.0, sample_rate=1e-9, local_steps=1, lr=1.0))
    assignment = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1e-9, sample_rate=1e-9, steps=1))
    result = experiment.client_round(0, assignment, experiment.trained(1), None)
    moved = torch.cat([(result.params[n] - p).flatten() for n, p in experiment.trained(1).items()])
    std = 1e-9 * 0.5 / (1e-9 * len(experiment.partitions[0]))
    assert len(moved) == 128 * 5 + 5
    assert float(moved.std()) == pytest.approx(std, rel=0.1)


def test_head_only_works_and_only_the_head_travels(config, tmp_path):
    """At epsilon 1, on digits that the body has never seen; the head is sent, the whole network is scored."""
    config = dataclasses.replace(
        config, num_rounds=20, noise_multiplier=5.9, local_steps=1, momentum=0.0, num_clients=10, evaluate_every=20
    )
    head = simulate(config, tmp_path / "head")
    whole = simulate(dataclasses.replace(config, train_layers="all", num_rounds=1), tmp_path / "all")
    assert head["test_accuracy"] >= 0.7
    assert head["epsilon"] <= 1.0
    assert head["trained_parameters"] == 645
    assert head["bytes_per_round"]["up"] < 0.25 * whole["bytes_per_round"]["up"]
    params, experiment = saved(tmp_path / "head"), Experiment.build(config)
    assert params.keys() == HEAD
    again, _ = measured(experiment.loss_fn.module, params, experiment.dataset.test, experiment.task)
    assert again.accuracy == head["test_accuracy"]


def test_the_head_first_and_then_all(config, tmp_path):
    config = dataclasses.replace(config, train_layers="head-then-all", unfreeze_round=3)
    simulate(dataclasses.replace(config, num_rounds=3), tmp_path / "three")
    simulate(config, tmp_path / "four")
    up = [json.loads(line)["bytes_up"] for line in (tmp_path / "four" / "timing.jsonl").read_text().splitlines()]
    assert up[1] == up[2] < up[3] == up[4]
    body = {n: p for n, p in Experiment.build(config).loss_fn.module.state_dict().items() if n not in HEAD}
    after = saved(tmp_path / "four")
    assert list(after) == list(
        Experiment.build(dataclasses.replace(config, train_layers="all", unfreeze_round=0)).trained(1)
    )
    assert all(not torch.equal(after[name], p) for name, p in body.items())
    assert [line["accepted"] for line in lines(tmp_path / "four")] == [0, 4, 4, 4, 4]


def test_until_the_switch_it_is_a_run_of_the_head(config, tmp_path):
    simulate(dataclasses.replace(config, num_rounds=3), tmp_path / "head")
    simulate(dataclasses.replace(config, train_layers="head-then-all", unfreeze_round=4), tmp_path / "then")
    assert lines(tmp_path / "then")[:4] == lines(tmp_path / "head")


def test_a_client_begins_anew_with_all_layers(config):
    """Momentum and direction of the head alone have no values for the rest."""
    experiment = Experiment.build(dataclasses.replace(config, train_layers="head-then-all", unfreeze_round=2))
    assignment = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=2))
    first = experiment.client_round(0, assignment, experiment.trained(1), None)
    assert first.state["optimizer"]["base"]["momentum"].keys() == HEAD
    second, whole = dataclasses.replace(assignment, round=2), experiment.trained(2)
    kept, anew = (experiment.client_round(0, second, whole, state) for state in (first.state, None))
    assert bits(kept.params) == bits(anew.params)
    third = dataclasses.replace(assignment, round=3)
    assert bits(experiment.client_round(0, third, whole, kept.state).params) != bits(
        experiment.client_round(0, third, whole, None).params
    )


@pytest.mark.by_default("fedavg-3")
@pytest.mark.parametrize(
    ("strategy", "stop"),
    [
        ("flwr.serverapp.strategy:FedAdam", 2),
        ("fedavg", 3),
        *(
            pytest.param(strategy, stop, marks=pytest.mark.slow)
            for strategy in ("fedavg", "flwr.serverapp.strategy:FedAvgM")
            for stop in (1, 2)
        ),
        pytest.param("flwr.serverapp.strategy:FedAdam", 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_is_resumed_on_either_side_of_the_switch(config, strategy, stop, tmp_path):
    config = dataclasses.replace(
        config, train_layers="head-then-all", unfreeze_round=3, strategy=strategy, stack_clients=2
    )
    whole = simulate(config, tmp_path / "whole")

    def interrupt(record):
        if record["round"] == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", on_round=interrupt)
    resumed = simulate(dataclasses.replace(config, resume=True), tmp_path / "cut")
    assert bits(saved(tmp_path / "cut")) == bits(saved(tmp_path / "whole"))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert resumed["epsilon"] == whole["epsilon"]


def test_a_run_is_not_resumed_from_other_weights(config, tmp_path):
    own = tmp_path / "own.pt"
    torch.save(saved(Path(config.start_from)), own)
    config = dataclasses.replace(config, start_from=str(own))

    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", on_round=interrupt)
    torch.save({n: 2 * p for n, p in torch.load(own, weights_only=True).items()}, own)
    with pytest.raises(SettingError, match=r"own.pt \(start_from\) has changed since .*run began; restore it"):
        simulate(dataclasses.replace(config, resume=True), tmp_path / "run")


def test_a_strategy_object_cannot_begin_anew(config, tmp_path):
    with pytest.raises(SettingError, match=r"unfreeze_round=3 is not possible with a strategy .*; name it"):
        simulate(
            dataclasses.replace(config, train_layers="head-then-all", unfreeze_round=3),
            tmp_path / "r",
            strategy=FedAvg(),
        )


def test_a_model_that_was_given_is_not_changed(config):
    model = mlp((1, 8, 8), 5)
    before = bits(model.state_dict())
    experiment = Experiment.build(config, model=model)
    assert bits(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())
    assert experiment.trained(1).keys() == HEAD


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start_head": "loaded", "dataset": "digits"}, r"3.weight \[5, 128\].*\[10, 128\].*set start_head='new'"),
        ({"model": "linear"}, "missing|not in the model"),
        ({"start_from": "nowhere"}, "No such file"),
        ({"train_layers": "last", "last_layers": 3}, "last_layers=3 is not at most 2"),
    ],
)
def test_what_does_not_fit_is_told_before_anybody_is_asked(config, changes, says, tmp_path):
    with pytest.raises(SettingError, match=says):
        simulate(dataclasses.replace(config, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start_from": ""}, "start_head='new' is not possible without start_from"),
        ({"last_layers": 2}, "last_layers=2 is not possible with train_layers='head'"),
        ({"unfreeze_round": 2}, "unfreeze_round=2 is not possible with train_layers='head'"),
        ({"train_layers": "head-then-all"}, r"unfreeze_round=0 is not in \[2, num_rounds=4\]"),
        ({"train_layers": "head-then-all", "unfreeze_round": 5}, "unfreeze_round=5 is not in"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config, changes, says):
    with pytest.raises(SettingError, match=says):
        dataclasses.replace(config, **changes)


@pytest.mark.slow
def test_workers_train_what_this_process_trains(config, tmp_path, ray_cluster):
    config = dataclasses.replace(config, train_layers="head-then-all", unfreeze_round=3)
    for name, workers in (("here", 0), ("there", 2)):
        simulate(dataclasses.replace(config, workers=workers), tmp_path / name)
    assert bits(saved(tmp_path / "here")) == bits(saved(tmp_path / "there"))
