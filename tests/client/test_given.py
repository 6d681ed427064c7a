"""A run works on copies of the objects that it is given, and its folder says what they were."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import threading
import tomllib

import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedAvg
from torch import nn

from fed_dpsat import RunConfig, simulate
from fed_dpsat.client.given import called, copied
from fed_dpsat.data.digits import digits
from fed_dpsat.errors import SettingError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.run.reading import load_run
from fed_dpsat.step.optimizers import DPSAT, DPSGD

CONFIG = RunConfig(num_clients=3, num_rounds=2, noise_multiplier=1.0, delta=1e-4)


class Remembering(FedAvg):
    """Goes further the more rounds it has seen."""

    rounds = 0

    def aggregate_train(self, server_round, replies):
        self.rounds += 1
        arrays, metrics = super().aggregate_train(server_round, replies)
        return type(arrays)({n: type(a)(a.numpy() * self.rounds) for n, a in arrays.items()}), metrics


class Restless:
    """DP-SGD whose rate grows with every step that the object itself has made, whoever asked."""

    def __init__(self):
        self.inner, self.steps = DPSGD(lr=0.5), 0

    def __getattr__(self, name):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def update(self, params, private_gradient, state, info):
        self.steps += 1
        return dataclasses.replace(self.inner, lr=0.1 * self.steps).update(params, private_gradient, state, info)


class Counting(nn.Module):
    """A linear model with a buffer that each forward pass of the model itself changes, and a frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.head = nn.Linear(64, 16), nn.Linear(16, 10)
        self.frozen.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return self.head(self.frozen(x.flatten(1)))


OBJECTS = {
    "FedAdam": lambda: {"strategy": FedAdam(eta=0.05)},
    "a strategy with a memory": lambda: {"strategy": Remembering()},
    "an optimizer with a memory": lambda: {"optimizer": Restless()},
    "a model": lambda: {"model": Counting()},
    "all": lambda: {"strategy": FedAdam(eta=0.05), "optimizer": Restless(), "model": Counting(), "dataset": digits()},
}


def model_of(folder):
    return torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]


@pytest.mark.by_default("all", "a strategy with a memory")
@pytest.mark.parametrize("case", OBJECTS)
def test_two_runs_with_one_object_give_the_same_bits(tmp_path, same_bits, case):
    objects = OBJECTS[case]()
    losses = [simulate(CONFIG, tmp_path / name, **objects)["test_loss"] for name in "ab"]
    assert losses[0] == losses[1]
    assert same_bits(model_of(tmp_path / "a"), model_of(tmp_path / "b"))


def test_the_callers_objects_are_as_they_were(tmp_path, same_bits):
    model, strategy, optimizer, dataset = Counting(), FedAdam(), Restless(), digits()
    model.head.eval()
    before, settings = copy.deepcopy(model), dict(vars(strategy))
    inputs, labels = dataset.train.inputs.clone(), dataset.train.labels.clone()
    config = dataclasses.replace(CONFIG, train_layers="head", attack="label-flip", attackers=0.4)
    simulate(config, tmp_path / "run", model=model, strategy=strategy, optimizer=optimizer, dataset=dataset)
    assert same_bits(model.state_dict(), before.state_dict())
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        assert (p.requires_grad, p.grad, p.device) == (old.requires_grad, None, old.device)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()] == [True, True, False]
    assert dict(vars(strategy)) == settings
    assert optimizer.steps == 0
    assert torch.equal(dataset.train.inputs, inputs)
    assert torch.equal(dataset.train.labels, labels)


@pytest.mark.parametrize("kind", ["strategy", "optimizer", "model"])
def test_what_cannot_be_copied_is_refused_in_one_line_before_anything(tmp_path, kind):
    held = {"strategy": FedAvg, "optimizer": Restless, "model": Counting}[kind]()
    held.lock = threading.Lock()
    remedy = rf"{kind}='{type(held).__name__}' is not an object that can be copied .*lock.*; name the function.*{kind}="
    with pytest.raises(SettingError, match=remedy) as raised:
        simulate(CONFIG, tmp_path / "run", **{kind: held})
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["dataset", "partition", "task", "model", "optimizer", "clipping", "strategy"])
def test_a_name_in_place_of_an_object_is_refused_with_its_place(tmp_path, kind):
    with pytest.raises(
        SettingError, match=rf"{kind}='mine' is not an object; give a name to RunConfig\({kind}='mine'\)"
    ):
        simulate(CONFIG, tmp_path / "run", **{kind: "mine"})
    assert not (tmp_path / "run").exists()


def test_a_copy_is_another_object():
    given = [1, [2]]
    assert copied("model", given) == given
    assert copied("model", given)[1] is not given[1]


def test_the_folder_says_what_the_objects_were(tmp_path):
    objects = {
        "strategy": FedAdam(),
        "optimizer": DPSAT(base=DPSGD(lr=0.5), rho=0.1),
        "model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        "dataset": dataclasses.replace(digits(), name="my digits"),
    }
    names = {
        "strategy": "flwr.serverapp.strategy.fedadam.FedAdam (from Python)",
        "optimizer": "fed_dpsat.step.optimizers.dpsat.DPSAT over fed_dpsat.step.optimizers.dpsgd.DPSGD (from Python)",
        "model": "torch.nn.modules.container.Sequential (from Python)",
        "dataset": "my digits (from Python)",
    }
    others = dataclasses.replace(CONFIG, base_optimizer="adam", optimizer_args="beta2 = 0.9", strategy_args="eta = 1.0")
    summary = simulate(others, tmp_path / "run", **objects)
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    unused = {"base_optimizer": "dp-sgd", "optimizer_args": "", "strategy_args": ""}
    assert {key: config[key] for key in {**names, **unused}} == {**names, **unused}
    assert {key: summary[key] for key in names} == names
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["objects"] == sorted(
        names, key=["dataset", "model", "optimizer", "strategy"].index
    )
    assert RunFolder(tmp_path / "run", resume=True).config().optimizer == names["optimizer"]
    assert load_run(tmp_path / "run").method == names["optimizer"]
    assert called(objects["strategy"]) == names["strategy"]


@pytest.mark.by_default("model", "strategy")
@pytest.mark.parametrize("lost", ["strategy", "optimizer", "model", "dataset"])
def test_a_resumed_run_wants_the_objects_again(tmp_path, lost):
    """It went on with what the settings happened to name."""

    def stop(record):
        if record["round"] == 1:
            raise KeyboardInterrupt

    objects = {"strategy": FedAdam(eta=0.05), "optimizer": DPSGD(lr=0.5), "model": Counting(), "dataset": digits()}
    with pytest.raises(KeyboardInterrupt):
        simulate(CONFIG, tmp_path / "run", on_round=stop, **objects)
    again = dataclasses.replace(CONFIG, resume=True)
    fewer = {name: value for name, value in objects.items() if name != lost}
    with pytest.raises(SettingError, match=rf"other settings \(.*{lost}"):
        simulate(again, tmp_path / "run", **fewer)
    assert lost != "model" or simulate(again, tmp_path / "run", **objects)["rounds_completed"] == 2


def test_a_named_strategy_is_called_by_its_name(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fed_dpsat"):
        assert simulate(CONFIG, tmp_path / "run")["strategy"] == "fedavg"
    assert "has no effect" not in caplog.text
