"""LiRA: scores, curve and rates on values that can be computed, and a model that has learnt by heart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.lab.audit.membership import (
    curve,
    draw_membership,
    likelihood_ratios,
    logit_confidence,
    membership_curve,
    rate_at,
)
from fed_dpsat.settings.config import RunConfig

CONFIG = RunConfig(num_clients=2, num_rounds=2, target_epsilon=3.0, delta=1e-4)


def test_the_curve_by_hand_with_a_tie():
    false, true = curve(np.array([4.0, 3.0, 2.0, 2.0, 1.0]), np.array([True, False, True, False, False]))
    assert false.tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert true.tolist() == pytest.approx([0, 0.5, 0.5, 1, 1])
    assert rate_at(false, true, 0.01) == 0.5
    assert rate_at(false, true, 0.7) == 1


def test_gaussian_confidences_give_the_curve_of_their_distance():
    """Members are N(mean_i + d, 1), others N(mean_i, 1): the area is Phi(d / sqrt(2)) for exact shadows."""
    generator = np.random.default_rng(0)
    members = generator.random((64, 400)) < 0.5
    values = generator.standard_normal((64, 400)) + 1.5 * members + 10 * generator.standard_normal(400)
    false, true = curve(likelihood_ratios(values, members).ravel(), members.ravel())
    area = np.trapezoid(true, false)
    assert area == pytest.approx(stats.norm.cdf(1.5 / math.sqrt(2)), abs=0.02)


def test_confidences_without_a_difference_are_a_coin():
    generator = np.random.default_rng(0)
    members = generator.random((16, 500)) < 0.5
    false, true = curve(likelihood_ratios(generator.standard_normal((16, 500)), members).ravel(), members.ravel())
    assert np.trapezoid(true, false) == pytest.approx(0.5, abs=0.02)
    assert rate_at(false, true, 0.01) < 0.02


def test_the_target_is_not_among_its_own_shadows():
    values, members = np.zeros((8, 3)), np.zeros((8, 3), dtype=bool)
    members[:4] = True
    values[:4] = 1
    values[:, 1] += np.arange(8) / 100
    moved = values.copy()
    moved[0] += 50  # the target alone: the others' scores may change, its own densities may not
    assert np.isfinite(likelihood_ratios(moved, members)).all()
    assert likelihood_ratios(moved, members)[0, 0] != likelihood_ratios(values, members)[0, 0]


def test_logit_confidence_is_that_of_the_softmax():
    experiment = Experiment.build(CONFIG)
    params = {name: p.detach() for name, p in experiment.loss_fn.module.named_parameters()}
    rows = np.arange(7)
    inputs, labels = experiment.dataset.train.batch(torch.from_numpy(rows))
    p = experiment.loss_fn.module(inputs).double().softmax(1)[torch.arange(7), labels]
    assert logit_confidence(experiment, params, rows) == pytest.approx((p / (1 - p)).log().detach().numpy(), abs=1e-4)


@pytest.mark.slow
def test_a_federation_without_noise_tells_more_than_one_with(tmp_path):
    settings = {"num_clients": 2, "num_rounds": 15, "delta": 1e-4, "model": "mlp", "lr": 1.0, "local_steps": 2}
    private = membership_curve(RunConfig(**settings, target_epsilon=1.0), models=8)
    bare = membership_curve(
        RunConfig(**{**settings, "private": False, "clip_norm": math.inf, "target_epsilon": 0.0}), models=8
    )
    assert 0.45 < private.area < 0.55
    assert bare.area > private.area + 0.02
    assert (bare.epsilon_ledger, bare.models, bare.decisions) == (math.inf, 8, 8 * 1437)
    draw_membership(bare, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_too_few_models():
    with pytest.raises(SettingError, match="models"):
        membership_curve(CONFIG, models=3)
