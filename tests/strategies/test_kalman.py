from __future__ import annotations

import numpy as np
import pytest

from fed_dpsat.flower.updates import KnownNoise
from strategies.kalman import Kalman


@pytest.fixture
def strategy():
    return Kalman(KnownNoise(lr=1.0, clip_norm=1.0))


def test_without_noise_it_is_the_mean(strategy, updates):
    for move in ([[1.0, 2.0], [3.0, 4.0]], [[-1.0, 0.0], [5.0, 5.0]]):
        u = updates(move)
        assert strategy.move(1, u) == pytest.approx(u.mean)


def test_a_constant_signal_is_found_better_than_by_one_round(strategy, updates):
    generator, signal = np.random.default_rng(0), np.full(2000, 0.5)
    for _ in range(20):
        u = updates([signal + generator.standard_normal(2000)], variances=1.0)
        moved = strategy.move(1, u)
    assert np.square(moved - signal).mean() < 0.2
    assert np.square(u.mean - signal).mean() > 0.9


def test_a_signal_that_turns_is_followed(strategy, updates):
    generator = np.random.default_rng(0)
    for level in [3.0] * 10 + [-3.0] * 10:
        moved = strategy.move(1, updates([level + generator.standard_normal(2000)], variances=1.0))
    assert moved.mean() == pytest.approx(-3.0, abs=0.5)


def test_pure_noise_hardly_moves(strategy, updates):
    generator = np.random.default_rng(0)
    moved = [strategy.move(1, updates([generator.standard_normal(5000)], variances=1.0)) for _ in range(10)]
    assert max(np.square(m).mean() for m in moved) < 0.1
