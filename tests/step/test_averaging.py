"""Averages of models: by hand, of released models alone, and without a part in what is charged or asked."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.averaging import AVERAGE, LocalAverage, ModelAverage, mean_of
from fed_dpsat.step.optimizers.base import StepInfo
from fed_dpsat.step.optimizers.dpsgd import DPSGD

NO_NOISE = torch.tensor(0.0, dtype=torch.float64)


def model(*values):
    return {"w": torch.tensor(values)}


def test_an_ema_by_hand():
    """mu is 1/10 after the first round, then 2/11; with decay 0.15 it stays at 0.15."""
    average = ModelAverage(kind="ema", decay=0.999, models=10)
    bounded = ModelAverage(kind="ema", decay=0.15, models=10)
    for round, w in enumerate((0.0, 10.0, 20.0)):
        average.add(round, model(w), {})
        bounded.add(round, model(w), {})
    assert float(average.value["w"]) == pytest.approx(2 / 11 * 9 + 9 / 11 * 20)
    assert float(bounded.value["w"]) == pytest.approx(0.15 * 9 + 0.85 * 20)


def test_the_last_k_by_hand():
    """The model at the start is not among them once a round has ended."""
    average, found = ModelAverage(kind="last-k", decay=0.999, models=3), []
    for round, w in enumerate((100.0, 1.0, 2.0, 6.0, 10.0)):
        average.add(round, model(w), {})
        found.append(float(average.value["w"]))
    assert found == pytest.approx([100, 1, 1.5, 3, 6])
    one = ModelAverage(kind="last-k", decay=0.999, models=1)
    for round, w in enumerate((1.0, 2.0, 3.0)):
        one.add(round, model(w), {})
    assert float(one.value["w"]) == 3
    assert len(one.state["models"]) == 1


@pytest.mark.parametrize("kind", ["ema", "last-k"])
def test_layers_that_join_have_their_frozen_values_before(kind):
    average = ModelAverage(kind=kind, decay=0.0, models=2)
    average.add(0, model(0.0), {})
    average.add(1, model(2.0), {})
    average.add(2, {**model(4.0), "body": torch.tensor([5.0])}, {"w": torch.zeros(1), "body": torch.tensor([3.0])})
    assert float(average.value["body"]) == (5 if kind == "ema" else 4)
    assert float(average.value["w"]) == (4 if kind == "ema" else 3)


def test_a_coordinate_that_no_model_moves_keeps_its_bits():
    w = torch.rand(1000)
    assert torch.equal(mean_of([{"w": w}] * 7)["w"], w)
    average = ModelAverage(kind="ema", decay=0.999, models=1)
    for round in range(5):
        average.add(round, {"w": w}, {})
    assert torch.equal(average.value["w"], w)


def steps_of(kind, models=10, count=4, first_step=8):
    """What three steps of SGD with the gradient -1 send, and the state that stays."""
    base = DPSGD(lr=1.0, momentum=0.0)
    wrapped = LocalAverage(base=base, kind=kind, decay=0.999, models=models, first_step=first_step, steps=count)
    params, state = model(0.0), wrapped.init(model(0.0))
    for step in range(count):
        info = StepInfo(index=first_step + step, noise_std=NO_NOISE, round=3)
        params, state = wrapped.update(params, model(-1.0), state, info)
    return float(params["w"]), state, base.init(model(0.0))


@pytest.mark.parametrize(
    ("kind", "models", "sent"),
    [("last-k", 10, 2.5), ("last-k", 2, 3.5), ("last-k", 1, 4.0), ("ema", 10, 3.6434)],
)
def test_local_models_by_hand(kind, models, sent):
    """Local models are 1, 2, 3 and 4. The ema: 0.9, 20/11 and on: mu is 1/10, 2/11, 3/12, 4/13."""
    mean = 0.0
    for t, w in enumerate((1, 2, 3, 4)):
        mu = (1 + t) / (10 + t)
        mean = mu * mean + (1 - mu) * w
    assert steps_of("ema")[0] == pytest.approx(mean, abs=1e-6)
    found, state, begun = steps_of(kind, models)
    assert found == pytest.approx(mean if kind == "ema" else sent, abs=1e-4)
    assert state.keys() == begun.keys(), "the state between rounds is that of the base"


CONFIG = RunConfig(optimizer="dp-sat", momentum=0.5, noise_multiplier=2.0, num_clients=2, local_steps=4, rho=0.1)
EVENT = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=4)


class Spied(DPSGD):
    """Keeps the private gradients that it is given."""

    seen: ClassVar[list] = []

    def update(self, params, private_gradient, state, info):
        Spied.seen.append({name: g.clone() for name, g in private_gradient.items()})
        return super().update(params, private_gradient, state, info)


@pytest.mark.parametrize("kind", ["ema", "last-k"])
def test_the_event_and_what_examples_are_asked_are_those_without_an_average(kind, same_bits):
    """Post-processing: event, private gradients and state are the same; one that moved the steps would differ."""
    found = {}
    for averaging in ("", kind):
        Spied.seen = []
        config = dataclasses.replace(CONFIG, local_averaging=averaging)
        experiment = Experiment.build(config, optimizer=Spied(lr=1.0, momentum=0.5))
        assignment = Assignment(round=1, event=EVENT)
        found[averaging] = experiment.client_round(0, assignment, experiment.shared(1), None), Spied.seen
    (plain, asked), (averaged, asked_too) = found.values()
    assert averaged.event == plain.event == EVENT
    assert len(asked) == 4
    assert all(same_bits(a, b) for a, b in zip(asked, asked_too, strict=True))
    assert same_bits(averaged.state["optimizer"]["momentum"], plain.state["optimizer"]["momentum"])
    assert AVERAGE not in averaged.state["optimizer"]
    assert not same_bits(averaged.params, plain.params)


class Keeps:
    """A step whose size is a number in its state, under a name that the average could take for its own."""

    def init(self, params):
        return {"average": {name: torch.ones_like(p) for name, p in params.items()}}

    def query_point(self, params, state, info):
        return params

    def update(self, params, private_gradient, state, info):
        moved = {name: p - state["average"][name] * private_gradient[name] for name, p in params.items()}
        return moved, {"average": {name: 2 * p for name, p in state["average"].items()}}


@pytest.mark.parametrize("kind", ["ema", "last-k"])
def test_a_base_keeps_a_state_of_any_name(kind):
    averaged = LocalAverage(base=Keeps(), kind=kind, decay=0.0, models=1, first_step=0, steps=3)
    params, state = model(0.0), averaged.init(model(0.0))
    for index in range(3):
        info = StepInfo(index=index, noise_std=NO_NOISE, round=1)
        assert averaged.query_point(params, state, info) == params
        params, state = averaged.update(params, model(-1.0), state, info)
    assert float(params["w"]) == 7
    assert float(state["average"]["w"]) == 8
    assert list(state) == ["average"]


def test_an_average_over_dp_sat_begins_each_round_anew():
    config = dataclasses.replace(CONFIG, local_averaging="last-k", averaging_models=2)
    experiment, state = Experiment.build(config), None
    params = experiment.shared(1)
    for round in (1, 2):
        result = experiment.client_round(0, Assignment(round=round, event=EVENT), params, state)
        params, state = result.params, result.state
        assert AVERAGE not in str(state.keys()) + str(state["optimizer"].keys())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"averaging": "mean"}, "averaging='mean' is not one of"),
        ({"averaging_decay": 0.9}, "averaging_decay=0.9 is not possible without an average of kind ema"),
        ({"averaging_models": 3, "averaging": "ema"}, "averaging_models=3 is not possible without .* last-k"),
        ({"local_averaging": "ema", "strategy": "ditto", "local_models": 2}, "local_averaging='ema' is not possible"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, says):
    with pytest.raises(SettingError, match=says):
        RunConfig(noise_multiplier=1.0, **changes)
