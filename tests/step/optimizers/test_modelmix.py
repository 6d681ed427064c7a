"""ModelMix steps from a random mixture of its last two iterates, and claims nothing for it."""

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
from fed_dpsat.client.train import Request
from fed_dpsat.errors import SettingError
from fed_dpsat.params import trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.optimizers.base import BASE
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.step.optimizers.modelmix import PREVIOUS, ModelMix
from fed_dpsat.testing.problems import step_info

PARAMS = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
GRADIENT = {"a": torch.tensor([4.0]), "b": torch.tensor([-8.0])}
CONFIG = RunConfig(optimizer="modelmix", noise_multiplier=1.0, num_clients=4, local_steps=3)
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=3))


def values(params):
    return [p.item() for p in params.values()]


def drawn(monkeypatch, *alphas):
    """Let the draws be these, one per coordinate."""
    left = iter(alphas)
    monkeypatch.setattr(torch, "rand_like", lambda p, **_: torch.full_like(p, next(left)))


def test_by_hand(monkeypatch):
    """w_prev = (1, 2), w = (0, 4): at alphas 1/4 and 3/4 the mixture is (3/4, 7/2), the step from there -g / 4."""
    drawn(monkeypatch, 0.25, 0.75)
    optimizer = ModelMix(base=DPSGD(lr=0.25), lr=0.25, gap_rate=0.0)
    params, state = optimizer.update(PARAMS, GRADIENT, optimizer.init(PARAMS), step_info())
    assert values(params) == [0, 4]
    assert values(optimizer.query_point(params, state, step_info())) == [0, 4]
    mixed, state = optimizer.update(params, GRADIENT, state, step_info())
    assert values(mixed) == [0.75 - 1, 3.5 + 2]
    assert values(state[PREVIOUS]) == [0, 4]


def test_iterates_that_are_close_are_moved_apart_by_hand(monkeypatch):
    """tau = 0.25 * 8 = 2. a: w_prev = 1, w = 0 become 1.5 and -0.5, 3/4 between is 0. b: a gap of 2 stays."""
    drawn(monkeypatch, 0.75, 0.75)
    optimizer = ModelMix(base=DPSGD(lr=0.25), lr=0.25, gap_rate=8.0)
    params, state = optimizer.update(PARAMS, GRADIENT, optimizer.init(PARAMS), step_info())
    mixed, _ = optimizer.update(params, {name: torch.zeros(1) for name in PARAMS}, state, step_info())
    assert values(mixed) == [0.75 * -0.5 + 0.25 * 1.5, 0.75 * 4 + 0.25 * 2]


def test_tau_follows_the_schedule(monkeypatch):
    """At step 1 of 2 half of lr is left, so tau = 0.25 / 2 * 8 = 1; equal iterates become w + 1/2 and w - 1/2."""
    drawn(monkeypatch, 1.0, 0.0)
    schedule = {"lr_schedule": "linear", "total_steps": 2}
    optimizer = ModelMix(base=DPSGD(lr=0.25, **schedule), lr=0.25, gap_rate=8.0, **schedule)
    zero = {name: torch.zeros(1) for name in PARAMS}
    params, state = optimizer.update(PARAMS, zero, optimizer.init(PARAMS), step_info())
    assert values(optimizer.update(params, zero, state, step_info(1))[0]) == [1.5, 1.5]


def oracle(vectors, lr, gap_rate, alphas):
    """Xiao et al. 2022 with coordinate-wise tau, in numpy."""
    w, previous, tau = vectors[0], None, lr * gap_rate
    for gradient, alpha in zip(vectors[1:], alphas, strict=True):
        yield w
        mixed = w
        if previous is not None:
            middle, sign = (w + previous) / 2, np.where(w >= previous, 1, -1)
            close = np.abs(w - previous) < tau
            a, b = (np.where(close, middle + s * sign * tau / 2, x) for s, x in ((1, w), (-1, previous)))
            mixed = alpha * a + (1 - alpha) * b
        previous, w = w, mixed - lr * gradient
    yield w


@pytest.mark.parametrize("gap_rate", [0.0, 1.0])
def test_against_an_oracle(gap_rate, walk, vectors):
    torch.manual_seed(3)
    alphas = [np.zeros(3)]
    for _ in range(49):
        a, b = torch.rand_like(torch.zeros(2).double()), torch.rand_like(torch.zeros(1).double())
        alphas.append(torch.cat([a, b]).numpy())
    torch.manual_seed(3)
    seen = walk(ModelMix(base=DPSGD(lr=0.1), lr=0.1, gap_rate=gap_rate), vectors)
    expected = list(oracle(vectors, 0.1, gap_rate, alphas))
    for t in range(50):
        np.testing.assert_allclose(seen[t][0], expected[t], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(seen[t][1], expected[t + 1], rtol=1e-11, atol=1e-12)


def test_with_nothing_to_mix_it_is_its_base():
    """w_prev = w and tau = 0."""
    base = DPSGD(lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer = ModelMix(base=base, lr=0.1, gap_rate=0.0)
    params = {"a": torch.randn(100)}
    gradient = {"a": torch.randn(100)}
    state = {**optimizer.init(params), PREVIOUS: params}
    moved, _ = optimizer.update(params, gradient, state, step_info())
    assert torch.equal(moved["a"], base.update(params, gradient, base.init(params), step_info())[0]["a"])


def test_alpha_is_uniform_per_coordinate():
    """w_prev = 0, w = 1, no step: the mixture is alpha. 30000 draws: a mean within 3.5 standard deviations, ends."""
    optimizer = ModelMix(base=DPSGD(lr=0.0), lr=0.0, gap_rate=0.0)
    torch.manual_seed(0)
    w, zero = {"a": torch.ones(30000)}, {"a": torch.zeros(30000)}
    state = {BASE: {}, PREVIOUS: zero}
    alpha = optimizer.update(w, zero, state, step_info())[0]["a"].double().numpy()
    assert abs(alpha.mean() - 0.5) < 3.5 / math.sqrt(12 * 30000)
    assert abs(alpha.var() - 1 / 12) < 3.5 * math.sqrt(1 / 180 / 30000)
    assert alpha.min() < 1e-3
    assert alpha.max() > 1 - 1e-3


@pytest.mark.parametrize("gap_rate", [-0.1, math.nan, math.inf])
def test_a_gap_outside_its_bounds_is_refused(gap_rate):
    with pytest.raises(SettingError, match=r"^gap_rate=.* is not in \[0, inf\); "):
        ModelMix(base=DPSGD(lr=1), lr=1, gap_rate=gap_rate)


def test_a_step_is_one_event_and_mixing_is_reproducible():
    experiment = Experiment.build(CONFIG)
    params = trainable(experiment.loss_fn.module)
    first, again, other = (experiment.client_round(client, ASSIGNMENT, params, None) for client in (0, 0, 1))
    assert first.event == ASSIGNMENT.event == make_plans(CONFIG)[0].event
    assert make_plans(CONFIG) == make_plans(dataclasses.replace(CONFIG, optimizer="dp-sgd"))
    assert all(torch.equal(first.params[n], again.params[n]) for n in params)
    assert any(not torch.equal(first.params[n], other.params[n]) for n in params)


def test_clients_mix_with_draws_of_their_own_when_they_train_together():
    experiment = Experiment.build(dataclasses.replace(CONFIG, stack_clients=3))
    params = trainable(experiment.loss_fn.module)
    requests = [Request(client=c, assignment=ASSIGNMENT, params=params, state=None) for c in range(3)]
    for request, result in zip(requests, experiment.client_rounds(requests), strict=True):
        for name, p in experiment.client_round(**vars(request)).params.items():
            torch.testing.assert_close(result.params[name], p, rtol=1e-5, atol=1e-6)
