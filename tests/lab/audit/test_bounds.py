"""Bounds on epsilon: values that a reader can compute, and coverage where epsilon is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fed_dpsat.errors import SettingError
from fed_dpsat.lab.audit.bounds import (
    best_one_run_epsilon,
    gaussian_epsilon,
    one_run_epsilon,
    one_run_p_value,
    two_world_epsilon,
    upper_rate,
)


def half_odds(epsilon):
    return 1 / (1 + math.exp(-epsilon))


def test_one_guess_without_delta_is_right_with_the_chance_of_randomised_response():
    assert one_run_p_value(1, 1, 1, math.log(3), 0.0) == pytest.approx(0.75)
    assert one_run_p_value(10, 1, 0, math.log(3), 0.0) == 1


def test_the_part_of_delta_by_hand():
    q = 0.75  # epsilon = log 3
    # one guess, right: P[1 > W >= 0] / 1 = 1 - q
    assert one_run_p_value(5, 1, 1, math.log(3), 0.01) == pytest.approx(q + 2 * 5 * 0.01 * (1 - q))
    # two guesses, both right: the larger of P[W = 1] / 1 and P[W < 2] / 2
    worst = max(2 * q * (1 - q), (1 - q**2) / 2)
    assert one_run_p_value(4, 2, 2, math.log(3), 0.01) == pytest.approx(q**2 + 2 * 4 * 0.01 * worst)


def test_all_right_without_delta_has_a_closed_form():
    # q^n = 0.05
    q = 0.05 ** (1 / 100)
    assert one_run_epsilon(100, 100, 100, 0.0, 0.95) == pytest.approx(math.log(q / (1 - q)), abs=1e-5)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "printed"),
    [
        (100, 100, 75, 0.0, 0.702),
        (100, 100, 75, 1e-4, 0.699),
        (1000, 100, 75, 1e-4, 0.673),
        (100_000, 1510, 1439, 1e-5, 2.675),
    ],
)
def test_the_bounds_that_its_paper_prints(canaries, guesses, correct, delta, printed):
    """Steinke et al. 2023, Appendix D and section 7; the last digit is rounded there, or cut off."""
    assert one_run_epsilon(canaries, guesses, correct, delta, 0.95) == pytest.approx(printed, abs=1e-3)


def test_no_guess_and_coin_like_guesses_show_nothing():
    assert one_run_epsilon(100, 0, 0, 0.0, 0.95) == 0
    assert one_run_epsilon(100, 100, 52, 0.0, 0.95) == 0
    assert two_world_epsilon(50, 50, (100, 100), 1e-5, 0.95) == 0


def test_delta_lowers_the_bound():
    bounds = [one_run_epsilon(1000, 100, 95, delta, 0.95) for delta in (0.0, 1e-5, 1e-4, 1e-3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_is_covered_and_shown(epsilon):
    """m answers of which each is true with probability exp(e) / (1 + exp(e)): e-DP, and the worst case of the bound."""
    draws = stats.binom(400, half_odds(epsilon)).rvs(400, random_state=np.random.default_rng(0))
    of = {v: one_run_epsilon(400, 400, int(v), 0.0, 0.9) for v in set(draws)}
    bounds = np.array([of[v] for v in draws])
    too_high = int((bounds > epsilon).sum())
    assert stats.binom(400, 0.1).sf(too_high - 1) > 1e-3  # not more often than one time in ten
    assert too_high > 10  # and not a bound so loose that it never fails
    assert np.median(bounds) > 0.7 * epsilon


@pytest.mark.slow
def test_a_gaussian_is_covered_with_the_best_of_several_numbers_of_guesses():
    """mu = 1, delta 1e-5: epsilon 4.377; scores of included canaries are N(1, 1), of others N(0, 1)."""
    generator, bounds = np.random.default_rng(0), []
    for _ in range(40):
        coins = generator.random(1000) < 0.5
        order = np.argsort(coins + generator.standard_normal(1000))
        tries = [(2 * k, int((~coins[order[:k]]).sum() + coins[order[-k:]].sum())) for k in (10, 25, 50, 125, 500)]
        bounds.append(best_one_run_epsilon(1000, tries, 1e-5, 0.95)[0])
    assert max(bounds) < 4.377
    assert np.median(bounds) > 0.8


def test_the_best_of_many_tries_is_charged_for_them():
    """One coin in 20 shows a bound at 95 %: of 20 tries one of them nearly always would."""
    alone = one_run_epsilon(100, 20, 17, 0.0, 0.95)
    best, index = best_one_run_epsilon(100, [(20, 10), (20, 17), (20, 11)], 0.0, 0.95)
    assert index == 1
    assert 0 < best == one_run_epsilon(100, 20, 17, 0.0, 1 - 0.05 / 3) < alone


def test_clopper_pearson():
    assert upper_rate(0, 100, 0.975) == pytest.approx(1 - 0.025 ** (1 / 100))  # (1 - p)^n = 0.025
    assert upper_rate(100, 100, 0.975) == 1
    assert upper_rate(0, 0, 0.975) == 1


def test_two_worlds_that_are_told_apart_always():
    rate = 1 - 0.025 ** (1 / 200)
    expected = math.log((1 - 1e-5 - rate) / rate)
    assert two_world_epsilon(0, 0, (200, 200), 1e-5, 0.95) == pytest.approx(expected)


def test_the_better_of_both_directions_counts():
    assert two_world_epsilon(0, 50, (100, 100), 0.0, 0.95) == two_world_epsilon(50, 0, (100, 100), 0.0, 0.95) > 1


def test_the_gaussian_bound_covers_a_gaussian_and_comes_near():
    generator = np.random.default_rng(0)
    bounds = []
    for _ in range(200):
        out, into = generator.standard_normal(1000), generator.standard_normal(1000) + 1
        bounds.append(gaussian_epsilon(int((out > 0.5).sum()), int((into <= 0.5).sum()), (1000, 1000), 1e-5, 0.9))
    too_high = int((np.array(bounds) > 4.377).sum())
    assert stats.binom(200, 0.1).sf(too_high - 1) > 1e-3
    assert 3.5 < np.median(bounds) < 4.377


@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(5, 6, 1), (5, 3, 4)])
def test_counts_that_cannot_be(canaries, guesses, correct):
    with pytest.raises(SettingError, match="correct"):
        one_run_p_value(canaries, guesses, correct, 1.0, 0.0)
