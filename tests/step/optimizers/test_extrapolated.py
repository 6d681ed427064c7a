"""Extrapolated SGD looks ahead along the last private gradient."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.params import trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.step.optimizers.extrapolated import Extrapolated
from fed_dpsat.testing.problems import step_info

PARAMS = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
GRADIENT = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}


def values(params):
    return [p.item() for p in params.values()]


def test_by_hand():
    """w = (1, 2) goes to w - g / 4 = (0.25, 1); the next query is 2 g further on."""
    optimizer = Extrapolated(base=DPSGD(lr=0.25), lr=0.25, lookahead=2.0)
    state = optimizer.init(PARAMS)
    assert values(optimizer.query_point(PARAMS, state, step_info())) == [1, 2]
    params, state = optimizer.update(PARAMS, GRADIENT, state, step_info())
    assert values(params) == [0.25, 1]
    assert values(optimizer.query_point(params, state, step_info())) == [0.25 - 6, 1 - 8]


def test_by_default_it_looks_one_step_ahead():
    optimizer = Extrapolated(base=DPSGD(lr=0.25), lr=0.25)
    params, state = optimizer.update(PARAMS, GRADIENT, optimizer.init(PARAMS), step_info())
    assert values(optimizer.query_point(params, state, step_info())) == [0.25 - 0.75, 1 - 1]


def test_against_an_oracle(walk, vectors):
    """w_{t+1/2} = w_t - lookahead * g(w_{t-1/2}); w_{t+1} = w_t - lr * g(w_{t+1/2}), in numpy."""
    seen = walk(Extrapolated(base=DPSGD(lr=0.1), lr=0.1, lookahead=0.7), vectors)
    w, last = vectors[0], np.zeros(3)
    for t, gradient in enumerate(vectors[1:]):
        np.testing.assert_allclose(seen[t][0], w - 0.7 * last, rtol=1e-12, atol=1e-14)
        w, last = w - 0.1 * gradient, gradient
        np.testing.assert_allclose(seen[t][1], w, rtol=1e-12, atol=1e-14)


def test_looking_nowhere_it_is_its_base(walk, vectors):
    base = DPSGD(lr=0.1, momentum=0.9, weight_decay=0.1)
    ours, theirs = walk(Extrapolated(base=base, lr=0.1, lookahead=0.0), vectors), walk(base, vectors)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.parametrize("lookahead", [-0.1, math.nan, math.inf])
def test_a_distance_outside_its_bounds_is_refused(lookahead):
    with pytest.raises(SettingError, match=r"^lookahead=.* is not in \[0, inf\); "):
        Extrapolated(base=DPSGD(lr=1), lr=1, lookahead=lookahead)


def test_a_step_is_one_event():
    config = RunConfig(optimizer="extrapolated", noise_multiplier=1.0, num_clients=4, optimizer_args="lookahead = 0.5")
    experiment = Experiment.build(config)
    assert experiment.optimizer.lookahead == 0.5
    assignment = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1))
    result = experiment.client_round(0, assignment, trainable(experiment.loss_fn.module), None)
    assert result.event == assignment.event == make_plans(config)[0].event == make_plans(
        dataclasses.replace(config, optimizer="dp-sgd", optimizer_args="")
    )[0].event  # fmt: skip
