import math

import pytest
from dp_accounting.gaussian_mechanism import get_sigma_gaussian

from fed_dpsat.accounting import calibration
from fed_dpsat.accounting.accountant import epsilon
from fed_dpsat.accounting.calibration import epsilon_table, noise_multiplier_for
from fed_dpsat.accounting.event import PrivacyError


@pytest.mark.by_default("*-pld", "1.0-*", "3.0-1e-05-*")
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("target", "delta", "sample_rate", "steps"),
    [
        (1.0, 1e-5, 0.05, 480),
        pytest.param(8.0, 1e-5, 0.05, 480, marks=pytest.mark.slow),
        (3.0, 1e-4, 0.5, 30),
        pytest.param(0.1, 1e-5, 0.01, 5000, marks=pytest.mark.slow),
        (50.0, 1e-5, 0.1, 10),
        (3.0, 1e-5, 1.0, 1),
        (0.01, 1e-3, 0.01, 1),
    ],
)
def test_the_smallest_noise_that_keeps_the_promise(event, accountant, target, delta, sample_rate, steps):
    noise = noise_multiplier_for(target, delta, sample_rate, steps, accountant)
    assert epsilon([event(noise, sample_rate, steps)], delta, accountant) <= target
    assert epsilon([event(noise / 1.005, sample_rate, steps)], delta, accountant) > target


def test_full_batches_need_the_noise_of_the_closed_form():
    noise = noise_multiplier_for(3.0, 1e-5, 1.0, 400)
    exact = 20 * get_sigma_gaussian(3.0, 1e-5)  # sqrt(400)
    assert exact <= noise <= 1.001 * exact


def test_the_official_notebook_needs_its_sigma():
    """METHODS: CIFAR-10, logical batch 2048 of 50,000, 30 epochs, epsilon 3 at 1e-5; they used 1.84 (by RDP)."""
    assert noise_multiplier_for(3.0, 1e-5, 2048 / 50_000, 30 * 25, "rdp") == pytest.approx(1.84, rel=0.03)


@pytest.mark.parametrize("target", [0.3, 2.5, 60.0])
def test_few_epsilons_are_computed(target, monkeypatch):
    """Each costs up to a second, and a federation of clients of many sizes has many noises to find."""
    asked = set()
    compute = calibration.epsilon
    monkeypatch.setattr(calibration, "epsilon", lambda events, *rest: asked.add(*events) or compute(events, *rest))
    noise_multiplier_for(target, 1e-5, 0.5, 30)
    assert 4 <= len(asked) <= 10


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf, True])
def test_a_target_is_positive_and_finite(target):
    with pytest.raises(PrivacyError, match="target_epsilon"):
        noise_multiplier_for(target, 1e-5, 0.5, 30)


@pytest.mark.parametrize("target", [1e-9, 1e-300])
def test_an_unreachable_target_says_what_to_change(target):
    with pytest.raises(PrivacyError, match=r"noise_multiplier > 10000; raise the target or delta"):
        noise_multiplier_for(target, 1e-5, 0.5, 30)


@pytest.mark.parametrize(("target", "delta", "sample_rate"), [(1e300, 1e-5, 0.5), (1.0, 0.01, 0.005)])
def test_a_target_that_asks_for_nothing_says_so(target, delta, sample_rate):
    with pytest.raises(PrivacyError, match="no useful privacy"):
        noise_multiplier_for(target, delta, sample_rate, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1.0, 0.0, 0.5, 30), "delta"),
        ((1.0, 1e-5, 1.5, 30), "sample_rate"),
        ((1.0, 1e-5, 0.5, 0), "steps"),
        ((1.0, 1e-5, 0.5, 30, "moments"), "accountant"),
    ],
)
def test_other_arguments_are_checked(arguments, says):
    with pytest.raises(PrivacyError, match=says):
        noise_multiplier_for(*arguments)


def test_a_table_has_both_accountants(event):
    rows = epsilon_table(1.0, 0.008, 125, [1, 3], 1e-5)
    assert [row.rounds for row in rows] == [1, 3]
    assert [round(row.epsilon_pld, 3) for row in rows] == [0.614, 0.926]
    assert [round(row.epsilon_rdp, 3) for row in rows] == [1.123, 1.316]
    assert epsilon_table(1.0, 0.008, 125, [], 1e-5) == []
