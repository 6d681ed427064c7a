"""Adaptive clipping: the bound finds the quantile, and gradient and count together cost the declared event."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fed_dpsat.accounting import PrivacyEvent, epsilon
from fed_dpsat.errors import SettingError
from fed_dpsat.step.clipping import AdaptiveClipping, Tally
from fed_dpsat.step.loop import Streams, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers import DPSGD
from fed_dpsat.step.sampling import PoissonSampler

NORMS = torch.linspace(0.01, 2.0, 400)  # gradient norms of the examples: the median is 1
RULE = AdaptiveClipping(clip_norm=0.1)


def test_the_count_is_moved_to_a_sensitivity_of_one_half():
    tally = Tally(clip_norm=1.0)
    tally.factors({"w": torch.tensor([0.25, 4.0, 1.0])})  # norms 0.5, 2, 1: two stay below
    assert tally.centred == 0.5
    tally.factors({"w": torch.tensor([9.0])})
    assert tally.centred == 0.0


@pytest.mark.parametrize(("noise", "batch"), [(1.0, 100.0), (0.7, 30.0), (5.0, 2000.0)])
def test_gradient_and_count_cost_what_the_event_says(noise, batch):
    """Two Gaussians released together are one whose precisions add: epsilon of the pair is that of ``noise``."""
    gradient, count = RULE.noise_multipliers(noise, batch)
    assert gradient > noise
    assert gradient**-2 + count**-2 == pytest.approx(noise**-2)
    pair = [PrivacyEvent(noise_multiplier=z, sample_rate=1.0, steps=1) for z in (gradient, count)]
    assert epsilon(pair, 1e-5) == pytest.approx(
        epsilon([PrivacyEvent(noise_multiplier=noise, sample_rate=1.0, steps=1)], 1e-5), rel=1e-6
    )


def test_noise_on_the_gradient_alone_would_be_undercharged():
    """The wrong version: z on the gradient and a count beside it, charged as z."""
    _, count = RULE.noise_multipliers(1.0, 100.0)
    pair = [PrivacyEvent(noise_multiplier=z, sample_rate=1.0, steps=1) for z in (1.0, count)]
    assert epsilon(pair, 1e-5) > 1.001 * epsilon([PrivacyEvent(noise_multiplier=1.0, sample_rate=1.0, steps=1)], 1e-5)


def test_a_count_that_would_cost_more_than_the_step_is_refused():
    with pytest.raises(SettingError, match="the count would cost more than the step"):
        RULE.noise_multipliers(1.0, 10.0)


def test_the_bound_moves_towards_the_quantile():
    assert RULE.next_clip_norm(1.0, 1.0) == pytest.approx(math.exp(-0.1))
    assert RULE.next_clip_norm(1.0, 0.5) == 1.0
    assert RULE.next_clip_norm(1.0, 0.0) == pytest.approx(math.exp(0.1))


def loss_fn(params, inputs, targets):
    return (inputs * params["w"]).sum(1)


def train(noise, steps, clip_norm=None, seed=0, clipping=RULE):
    inputs = NORMS[:, None] * torch.eye(1)
    sampler = PoissonSampler(num_examples=len(NORMS), sample_rate=0.5)
    return train_locally(
        {"w": torch.zeros(1)},
        lambda i: (inputs[i], torch.zeros(len(i))),
        loss_fn=loss_fn,
        optimizer=(optimizer := DPSGD(lr=0.0)),
        state=optimizer.init({"w": torch.zeros(1)}),
        clip_norm=clip_norm,
        sampler=sampler,
        clipping=clipping,
        mechanism=GaussianMechanism(
            noise_multiplier=noise, clip_norm=clipping.clip_norm, expected_batch_size=sampler.expected_batch_size
        ),
        local_steps=steps,
        streams=Streams(seed=seed, client=0, round=1),
        engine="vmap",
    )


def bound(result):
    return result.clip_norm


def test_training_finds_the_median_with_and_without_noise():
    assert bound(train(0.0, 60)) == pytest.approx(1.0, abs=0.15)
    assert bound(train(1.0, 60)) == pytest.approx(1.0, abs=0.3)


def test_a_round_goes_on_from_what_was_learned():
    first = train(0.0, 5)
    assert bound(train(0.0, 5, first.clip_norm)) > bound(first) > RULE.clip_norm


def test_the_event_is_that_of_the_declared_noise():
    assert train(2.0, 3).event == PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=3)


def test_the_gradient_takes_the_larger_noise_scaled_to_the_bound_of_the_step():
    """With every gradient 0 the update is noise alone: N(0, (z_gradient * C / B)^2), C that of the first step."""
    sampler = PoissonSampler(num_examples=400, sample_rate=0.5)
    draws = []
    for seed in range(40):
        result = train_locally(
            {"w": torch.zeros(1000)},
            lambda i: (torch.zeros(len(i), 1000), torch.zeros(len(i))),
            loss_fn=loss_fn,
            optimizer=(optimizer := DPSGD(lr=1.0)),
            state=optimizer.init({"w": torch.zeros(1000)}),
            sampler=sampler,
            clipping=RULE,
            mechanism=GaussianMechanism(noise_multiplier=5.0, clip_norm=0.1, expected_batch_size=200.0),
            local_steps=1,
            streams=Streams(seed=seed, client=0, round=1),
            engine="vmap",
        )
        draws.append(result.params["w"].numpy())
    gradient, _ = RULE.noise_multipliers(5.0, 200.0)
    seen = np.concatenate(draws).std() * 200.0 / 0.1
    assert gradient / 5.0 > 1.03  # so that the test tells the two apart
    assert seen == pytest.approx(gradient, rel=0.015)


@pytest.mark.parametrize("bad", [{"clip_quantile": 0.0}, {"clip_quantile": 1.0}, {"clip_lr": -1.0}])
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(SettingError):
        AdaptiveClipping(clip_norm=1.0, **bad)
