"""The noise that a strategy counts on is the noise that clients add."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fed_dpsat import RunConfig
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.flower.updates import KnownNoise
from fed_dpsat.params import trainable


def measured(config: RunConfig, round: int) -> np.ndarray:
    """The noise in one client's update: with it, less without it. Steps are small, so gradients hardly differ."""
    experiment = Experiment.build(config)
    params = trainable(experiment.loss_fn.module)
    assignment = Assignment(
        round=round, event=PrivacyEvent(noise_multiplier=2.0, sample_rate=0.25, steps=config.local_steps)
    )
    noisy, clean = (
        experiment.client_round(
            0,
            dataclasses.replace(assignment, event=dataclasses.replace(assignment.event, noise_multiplier=z)),
            params,
            None,
        ).params
        for z in (2.0, 0.0)
    )
    return np.concatenate([(noisy[n] - clean[n]).double().numpy().ravel() for n in params])


@pytest.mark.by_default("dp-sgd-4-cosine", "dp-sat-1-cosine", "extrapolated-4-constant")
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize("optimizer", ["dp-sgd", "dp-sat", "extrapolated"])
def test_known_variance_is_that_of_the_update(optimizer, local_steps, schedule):
    config = RunConfig(
        optimizer=optimizer, local_steps=local_steps, lr=1e-3, lr_schedule=schedule, num_rounds=6, sample_rate=0.25,
        noise_multiplier=2.0, clip_norm=0.7,
    )  # fmt: skip
    noise = np.concatenate([measured(dataclasses.replace(config, seed=seed), round=4) for seed in range(4)])
    size = len(Experiment.build(config).partitions[0])
    event = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.25, steps=local_steps)
    known = KnownNoise.of(config).variance(event, size, round=4)
    assert np.var(noise) == pytest.approx(known, rel=0.1)  # 2600 normals: 3 % is one standard deviation


def test_by_hand():
    """lr 2, multiplier 3, clip norm 0.5, expected batch 0.1 * 60: 2 * 3 * 0.5 / 6 = 0.5 a step, and 4 make 1."""
    event = PrivacyEvent(noise_multiplier=3.0, sample_rate=0.1, steps=4)
    assert KnownNoise(lr=2.0, clip_norm=0.5).variance(event, 60, round=1) == pytest.approx(1.0)


def test_without_noise_even_a_bound_of_inf_leaves_none():
    event = PrivacyEvent(noise_multiplier=0.0, sample_rate=0.1, steps=4)
    assert KnownNoise(lr=2.0, clip_norm=float("inf")).variance(event, 60, round=1) == 0.0
