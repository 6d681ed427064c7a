from __future__ import annotations

import numpy as np
import pytest

from fed_dpsat.errors import SettingError
from fed_dpsat.flower.updates import KnownNoise
from strategies.trimmed import Trimmed, noise_around_median, outliers


def test_one_that_is_far_is_an_outlier(updates):
    u = updates([[1.0], [2.0], [3.0], [100.0]])
    assert outliers(u, trim=0.25, factor=2.0).tolist() == [False, False, False, True]


def test_no_more_than_the_share_and_the_farthest_first(updates):
    u = updates([[0.0], [0.1], [0.2], [50.0], [100.0]])
    assert outliers(u, trim=0.2, factor=2.0).tolist() == [False] * 4 + [True]
    assert outliers(u, trim=0.4, factor=2.0).tolist() == [False] * 3 + [True] * 2


def test_noise_makes_no_outlier(noisy):
    for seed in range(20):
        assert not outliers(noisy(seed=seed), trim=0.3, factor=2.0).any()


def test_a_client_with_more_noise_of_its_own_is_none(updates):
    generator = np.random.default_rng(0)
    variances = np.array([1.0] * 9 + [100.0])
    moves = generator.standard_normal((10, 400)) * np.sqrt(variances)[:, None]
    assert not outliers(updates(moves, variances), trim=0.3, factor=2.0).any()
    assert outliers(updates(moves, 1.0), trim=0.3, factor=2.0).tolist() == [False] * 9 + [True]


def test_a_precise_client_among_noisy_ones_is_none(updates):
    """The noise of the median lies between it and the precise client."""
    variances = np.array([1.0] * 8 + [0.01] * 2)
    for seed in range(10):
        moves = np.random.default_rng(seed).standard_normal((10, 400)) * np.sqrt(variances)[:, None]
        assert not outliers(updates(moves, variances), trim=0.3, factor=2.0).any()


def test_the_noise_around_the_median_by_a_known_case():
    """Of two, the median is the mean, so each is half the difference away: variance (a + b) / 4."""
    assert noise_around_median(np.array([1.0, 3.0])) == pytest.approx([1.0, 1.0], rel=0.1)
    assert noise_around_median(np.full(101, 2.0)) == pytest.approx(np.full(101, 2.0), rel=0.15)
    assert noise_around_median(np.zeros(3)).tolist() == [0, 0, 0]


def test_an_attacker_beyond_the_noise_is_one(noisy):
    u = noisy()
    u.moves[:3] += 2.0
    assert outliers(u, trim=0.3, factor=2.0).tolist() == [True] * 3 + [False] * 7


def test_half_is_too_many():
    with pytest.raises(SettingError, match=r"trim=0.5 is not in \[0, 0.5\)"):
        Trimmed(KnownNoise(lr=1.0, clip_norm=1.0), trim=0.5)
