from __future__ import annotations

import numpy as np
import pytest

from fed_dpsat.errors import SettingError
from fed_dpsat.flower.updates import KnownNoise
from strategies.noise_aware import NoiseAware, weights

EQUAL = np.full(4, 0.25)


def test_weights_go_with_the_inverse_variance():
    assert weights(EQUAL, np.array([1.0, 1.0, 2.0, 4.0]), most=4.0) == pytest.approx(np.array([4, 4, 2, 1]) / 11)


def test_without_noise_they_are_the_shares():
    shares = np.array([0.1, 0.2, 0.7])
    assert weights(shares, np.zeros(3), 4.0) is shares


def test_a_weight_is_bounded_and_the_rest_is_dealt_in_proportion():
    found = weights(EQUAL, np.array([1e-6, 1.0, 1.0, 2.0]), most=2.0)
    assert found == pytest.approx([0.5, 0.2, 0.2, 0.1])


def test_a_bound_that_brings_others_to_theirs():
    found = weights(np.array([0.1, 0.3, 0.6]), np.array([1e-6, 0.1, 1.0]), most=1.5)
    assert found == pytest.approx([0.15, 0.45, 0.4])


def test_with_a_bound_of_one_they_are_the_shares():
    shares = np.array([0.1, 0.2, 0.7])
    assert weights(shares, np.array([3.0, 1.0, 2.0]), most=1.0) == pytest.approx(shares)


def test_the_mean_has_less_noise_than_that_by_size(updates):
    u = updates(np.random.default_rng(0).standard_normal((4, 5000)) * [[1], [1], [5], [5]], [1, 1, 25, 25])
    assert np.var(weights(u.shares, u.variances, 4.0) @ u.moves) == pytest.approx(1 / (2 + 2 / 25), rel=0.1)
    assert np.var(u.mean) == pytest.approx(52 / 16, rel=0.1)


def test_a_bound_below_one_is_refused():
    with pytest.raises(SettingError, match=r"most=0.5 is not at least 1"):
        NoiseAware(KnownNoise(lr=1.0, clip_norm=1.0), most=0.5)
