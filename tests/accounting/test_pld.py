import math
import random

import pytest
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from dp_accounting.pld import PLDAccountant

from fed_dpsat.accounting import pld
from fed_dpsat.accounting.event import PrivacyError, merge
from fed_dpsat.accounting.pld import discretization, epsilon_pld


def outside(history, delta, grid):
    """dp_accounting's own accountant, composing event by event."""
    accountant = PLDAccountant(value_discretization_interval=grid)
    for event in history:
        accountant.compose(event.to_dp_event())
    return accountant.get_epsilon(delta)


@pytest.mark.slow
def test_agrees_with_dp_accounting_on_a_random_grid(event):
    draw = random.Random(1)
    for _ in range(6):
        history = merge(
            event(10 ** draw.uniform(-0.2, 1), 10 ** draw.uniform(-2.5, 0), int(10 ** draw.uniform(0, 3)))
            for _ in range(draw.choice([1, 1, 2, 3]))
        )
        delta = 10 ** draw.uniform(-7, -3)
        assert epsilon_pld(history, delta) == pytest.approx(
            outside(history, delta, discretization(history)), rel=1e-6
        ), history


def test_agrees_with_dp_accounting_where_only_some_steps_are_sampled(event):
    history = merge([event(5.0, 1.0, 20), event(8.0, 1.0, 5), event(1.0, 0.01, 100)])
    # It rounds the two unsampled Gaussians one by one, we round their sum: a little less is lost.
    assert epsilon_pld(history, 1e-5) == pytest.approx(outside(history, 1e-5, discretization(history)), rel=1e-5)


def test_full_batches_have_a_closed_form(event):
    history = merge([event(5.0, 1.0, 20), event(8.0, 1.0, 5)])
    exact = get_epsilon_gaussian(1 / math.sqrt(20 / 25 + 5 / 64), 1e-5)
    assert epsilon_pld(history, 1e-5) == pytest.approx(exact, rel=1e-12)
    assert outside(history, 1e-5, 1e-4) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("noise_multiplier", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("steps", [1, 100, 10_000])
def test_never_below_the_exact_value_and_at_most_3e_4_above(event, noise_multiplier, steps):
    # A rate a little below 1 takes the path of sampled events; its exact value is that of rate 1 to 1e-7.
    history = merge([event(noise_multiplier, 1 - 1e-8, steps)])
    for delta in (1e-3, 1e-5, 1e-9):
        exact = get_epsilon_gaussian(noise_multiplier / math.sqrt(steps), delta)
        error = epsilon_pld(history, delta) / exact - 1
        assert -1e-6 < error < 3e-4


@pytest.mark.parametrize(
    ("release", "most"),
    [
        ((1.0, 0.01, 1000), 3e-4),
        ((0.5, 0.01, 100), 3e-4),
        ((0.6, 0.9, 10), 3e-4),
        ((20.0, 0.0005, 1000), 3e-4),
        ((5.0, 0.1, 100_000), 3e-4),
        ((0.3, 0.05, 1000), 1e-3),
    ],
)
def test_the_grid_costs_no_more_than_declared(event, monkeypatch, release, most):
    history = merge([event(*release)])
    ours = epsilon_pld(history, 1e-5)
    monkeypatch.setattr(pld, "POINTS_PER_DEVIATION", 4 * pld.POINTS_PER_DEVIATION)
    finer = epsilon_pld(history, 1e-5)
    assert -1e-6 < ours / finer - 1 < most


def test_a_grid_cut_short_only_raises_epsilon(event, monkeypatch):
    history = merge([event(1.0, 0.001, 100)])
    ours = epsilon_pld(history, 1e-5)
    monkeypatch.setattr(pld, "MAX_POINTS", 2**13)
    assert 1.001 * ours < epsilon_pld(history, 1e-5) < 1.05 * ours


def test_the_usual_grid_would_double_epsilon_where_losses_are_small(event):
    history = merge([event(20.0, 0.0005, 1000)])
    assert outside(history, 1e-5, 1e-4) > 1.9 * epsilon_pld(history, 1e-5)


def test_the_grid_of_one_kind_does_not_depend_on_the_steps(event):
    assert discretization(merge([event(steps=1)])) == discretization(merge([event(steps=100_000)]))


def test_the_grid_is_bounded(event):
    for release in [(0.01, 0.5, 10), (0.3, 1e-6, 10), (0.5, 1e-5, 10), (1e4, 1e-3, 10), (1.0, 1e-9, 1)]:
        history = merge([event(*release), event(1.0, 0.5, 1)])
        grid = discretization(history)
        assert math.log2(grid).is_integer()
        assert pld.FINEST <= grid <= pld.COARSEST


@pytest.mark.parametrize(
    ("release", "low", "high"),
    [
        ((0.0, 0.5, 1), math.inf, math.inf),
        ((1e-200, 0.5, 1), math.inf, math.inf),
        ((1e-9, 0.5, 1), 1e17, math.inf),  # finite, absurd, and not 0
        ((0.005, 0.5, 1), 2e4, 3e4),  # sampling is not counted: 1 / (2 * 0.005**2) = 20,000
        ((0.05, 0.01, 10), 500, 1000),
        ((1.0, 1 - 1e-15, 1), 4.3771, 4.3772),
        ((1.0, 1e-12, 1000), 0.0, 0.0),
        ((1e6, 0.5, 1000), 0.0, 1e-4),
    ],
)
def test_extremes_are_upper_bounds_not_accidents(event, release, low, high):
    value = epsilon_pld(merge([event(*release)]), 1e-5)
    assert low <= value <= high
    assert math.isinf(value) == (math.isinf(low))


def test_a_delta_that_arithmetic_cannot_resolve_is_refused(event):
    assert epsilon_pld(merge([event(2.0, 0.1, 1000)]), 1e-10) > epsilon_pld(merge([event(2.0, 0.1, 1000)]), 1e-9)
    with pytest.raises(PrivacyError, match="rdp"):
        epsilon_pld(merge([event(2.0, 0.1, 1000)]), 1e-12)
    with pytest.raises(PrivacyError, match="rdp"):
        epsilon_pld(merge([event(2.0, 0.1, 2**30)]), 0.5)
    assert epsilon_pld(merge([event(2.0, 1.0, 1000)]), 1e-100) > 0  # closed form


@pytest.mark.parametrize("steps", [6300, 6700, 7100, 7500])
def test_epsilon_around_700_is_neither_inf_nor_rounded(event, steps):
    """There dp_accounting's own search returns inf, or loses 0.1 %: exp(-epsilon) underflows."""
    history = merge([event(4.0, 1 - 1e-8, 3 * steps)])
    exact = get_epsilon_gaussian(4 / math.sqrt(3 * steps), 1e-5)
    assert 600 < exact < 1100
    assert -1e-6 < epsilon_pld(history, 1e-5) / exact - 1 < 3e-4


def test_nothing_released_costs_nothing():
    assert epsilon_pld((), 1e-5) == 0
