"""The round of a client: a function of seed, client and round, with a state of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import ModelError, RunError
from fed_dpsat.params import trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.optimizers import DPSGD
from fed_dpsat.step.optimizers.base import ASCENT, BASE
from fed_dpsat.testing.problems import step_info

CONFIG = RunConfig(noise_multiplier=1.0, num_clients=4, local_steps=2, num_rounds=3, momentum=0.5)
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=2))


@pytest.fixture(scope="module")
def experiment():
    return Experiment.build(CONFIG)


@pytest.fixture(scope="module")
def params(experiment):
    return trainable(experiment.loss_fn.module)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def with_memory(memory):
    return Experiment.build(dataclasses.replace(CONFIG, ascent_memory=memory))


def test_a_round_is_a_function_of_seed_client_and_round(experiment, params):
    first = experiment.client_round(1, ASSIGNMENT, params, None)
    assert same(first.params, experiment.client_round(1, ASSIGNMENT, params, None).params)
    for other in (
        experiment.client_round(2, ASSIGNMENT, params, None),
        experiment.client_round(1, dataclasses.replace(ASSIGNMENT, round=2), params, None),
        experiment.client_round(1, dataclasses.replace(ASSIGNMENT, attempt=1), params, None),
    ):
        assert not same(first.params, other.params)


def test_the_event_is_the_one_that_the_server_charges(experiment, params):
    assert experiment.client_round(0, ASSIGNMENT, params, None).event == ASSIGNMENT.event == make_plans(CONFIG)[0].event


def test_momentum_and_ascent_stay_with_the_client(experiment, params):
    first = experiment.client_round(0, ASSIGNMENT, params, None)
    assert first.state.keys() == {"optimizer"}
    assert ASCENT in first.state["optimizer"]
    assert "momentum" in first.state["optimizer"][BASE]
    second = dataclasses.replace(ASSIGNMENT, round=2)
    kept = experiment.client_round(0, second, params, first.state)
    forgot = experiment.client_round(0, second, params, None)
    assert not same(kept.params, forgot.params)


def test_steps_are_counted_over_the_federation(experiment, params):
    """Two rounds of two steps came before: the third round begins with step 4, for every client."""
    told = []

    class Listening(DPSGD):
        def query_point(self, params, state, info):
            told.append((info.index, info.round, float(info.noise_std)))
            return params

    listening = dataclasses.replace(experiment, optimizer=Listening(lr=0.1))
    listening.client_round(0, dataclasses.replace(ASSIGNMENT, round=3), params, None)
    std = (
        ASSIGNMENT.event.noise_multiplier * CONFIG.clip_norm / (ASSIGNMENT.sample_rate * len(experiment.partitions[0]))
    )
    assert told == [(4, 3, std), (5, 3, std)]


def first_query(experiment, params, state):
    """The first point at which ``experiment`` takes a gradient."""
    points = []

    class Watching(type(experiment.optimizer)):
        def query_point(self, at, state, info):
            points.append(super().query_point(at, state, info))
            return points[-1]

    dataclasses.replace(experiment, optimizer=Watching(**vars(experiment.optimizer))).client_round(
        0, ASSIGNMENT, params, state
    )
    return points[0]


def test_ascent_memory_says_what_the_first_step_climbs(experiment, params):
    mine = {name: torch.ones_like(p) for name, p in params.items()}
    state = {**experiment.optimizer.init(params), ASCENT: mine}
    up = experiment.optimizer.query_point(params, state, step_info())
    state = {"optimizer": state}
    assert same(first_query(with_memory("client"), params, state), up)
    assert same(first_query(with_memory("zero"), params, state), params)


def test_a_state_of_another_version_is_refused(experiment, params):
    with pytest.raises(RunError, match="of another version"):
        experiment.client_round(0, ASSIGNMENT, params, {ASCENT: params})


class CountsDarkImages(nn.Module):
    """Writes what made-up examples do not have."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.register_buffer("dark", torch.zeros(1))

    def forward(self, x):
        with torch.no_grad():
            self.dark = self.dark + (x.mean() < 0).float()
        return self.head(x.flatten(1))


def test_one_that_does_so_for_some_examples_fails_that_client_and_is_put_back():
    plain = Experiment.build(CONFIG)
    dark = plain.dataset.train.inputs.clone()
    dark[plain.partitions[1]] = 0
    data = dataclasses.replace(plain.dataset, train=dataclasses.replace(plain.dataset.train, inputs=dark))
    experiment = Experiment.build(dataclasses.replace(CONFIG, engine="planned"), dataset=data, model=CountsDarkImages())
    assignment, start = (
        dataclasses.replace(ASSIGNMENT, event=dataclasses.replace(ASSIGNMENT.event, sample_rate=1.0)),
        experiment.trained(1),
    )
    with pytest.raises(ModelError, match="CountsDarkImages: add of a tensor that another pass made"):
        experiment.client_round(1, assignment, start, None)
    assert float(experiment.loss_fn.module.dark) == 0
