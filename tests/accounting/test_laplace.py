"""Epsilon of Laplace events: closed forms, densities integrated, and who refuses them."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.optimize import brentq

from fed_dpsat.accounting import PrivacyLedger, epsilon, epsilon_table, noise_multiplier_for
from fed_dpsat.accounting.accountant import has_rdp
from fed_dpsat.accounting.event import LAPLACE, PrivacyError, PrivacyEvent, dominant, merge
from fed_dpsat.accounting.released import epsilon_released


def laplace(noise_multiplier, sample_rate=1.0, steps=1):
    return PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps, kind=LAPLACE)


def integrated(noise_multiplier, sample_rate, delta):
    """Epsilon of one sampled step: the larger of both hockey-stick divergences of the densities, on a fine grid."""
    x, width = np.linspace(-35 * noise_multiplier, 1 + 35 * noise_multiplier, 500_001, retstep=True)
    without, with_it = (np.exp(-np.abs(x - m) / noise_multiplier) / (2 * noise_multiplier) for m in (0, 1))
    mixed = (1 - sample_rate) * without + sample_rate * with_it

    def beyond(e):
        pairs = (mixed, without), (without, mixed)
        return max(float(np.maximum(p - math.exp(e) * q, 0).sum() * width) for p, q in pairs) - delta

    return brentq(beyond, 0, 1 / noise_multiplier, xtol=1e-9)


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_one_step_has_a_closed_form(noise_multiplier, delta):
    """delta = 1 - exp((epsilon - 1 / z) / 2) for epsilon below 1 / z."""
    exact = 1 / noise_multiplier + 2 * math.log1p(-delta)
    assert -1e-9 < epsilon([laplace(noise_multiplier)], delta) / exact - 1 < 3e-3


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_without_sampling_k_steps_are_k_over_z_at_a_tiny_delta(steps):
    assert epsilon([laplace(5.0, steps=steps)], 1e-300) == pytest.approx(steps / 5, rel=1e-12)
    assert epsilon([laplace(5.0, steps=steps)], 2.0**-steps * 1e-12) == pytest.approx(steps / 5, rel=1e-6)
    assert epsilon([laplace(5.0, 0.1, steps)], 1e-300) == pytest.approx(steps * math.log1p(0.1 * math.expm1(0.2)))


def test_pure_epsilon_is_no_gaussian_one():
    """A Gaussian of that noise has no epsilon at delta 0."""
    gaussian = PrivacyEvent(noise_multiplier=5.0, sample_rate=1.0, steps=3)
    assert epsilon([gaussian], 1e-30) > 2 * epsilon([laplace(5.0, steps=3)], 1e-30)


@pytest.mark.parametrize(
    ("noise_multiplier", "sample_rate", "delta"),
    [(2.0, 0.1, 1e-2), (2.0, 0.1, 1e-3), (0.5, 0.05, 1e-3), (5.0, 0.5, 1e-3)],
)
def test_one_sampled_step_against_integrated_densities(noise_multiplier, sample_rate, delta):
    exact = integrated(noise_multiplier, sample_rate, delta)
    assert -1e-5 < epsilon([laplace(noise_multiplier, sample_rate)], delta) / exact - 1 < 3e-3


@pytest.mark.parametrize(
    ("noise_multiplier", "sample_rate", "steps"), [(1.0, 0.01, 1000), (10.0, 1.0, 100), (0.3, 0.02, 50)]
)
def test_many_steps_agree_with_dp_accounting(noise_multiplier, sample_rate, steps):
    event = laplace(noise_multiplier, sample_rate, steps)
    accountant = PLDAccountant(value_discretization_interval=2.0**-13)
    accountant.compose(event.to_dp_event())
    assert epsilon([event], 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    inner = dp_accounting.LaplaceDpEvent(noise_multiplier)
    sampled = dp_accounting.PoissonSampledDpEvent(sample_rate, inner) if sample_rate < 1 else inner
    assert event.to_dp_event() == dp_accounting.SelfComposedDpEvent(sampled, steps)


def delta_of_one(shift, e):
    """Hockey-stick divergence of Lap(0, 1) and Lap(shift, 1) at exp(e), for any real e."""
    inside = -np.expm1((np.clip(e, -shift, shift) - shift) / 2)
    return np.where(e <= -shift, -np.expm1(np.minimum(e, 0)), np.where(e < shift, inside, 0))


def delta_of_two(first, second, e):
    """The same for two numbers that move by ``first`` and ``second``."""
    x, width = np.linspace(-40, 40, 200_001, retstep=True)
    loss = np.abs(x - first) - np.abs(x)
    return float((np.exp(-np.abs(x)) / 2 * delta_of_one(second, e - loss)).sum() * width)


@pytest.mark.parametrize("total", [0.2, 1.0, 4.0])
def test_numbers_with_a_bound_of_their_l1_norm_cost_no_more_than_one_number(total):
    """The lemma of docs/privacy.md; with a bound of their L2 norm they cost more."""
    for e in np.linspace(0, total, 4)[:-1]:
        one = float(delta_of_one(total, e))
        for share in (0.05, 0.3, 0.5):
            assert delta_of_two(share * total, (1 - share) * total, e) <= one + 1e-6
    e = 0.9 * total
    assert delta_of_two(total / math.sqrt(2), total / math.sqrt(2), e) > float(delta_of_one(total, e)) + 1e-4


def test_rdp_refuses_what_is_sampled_and_bounds_what_is_not():
    with pytest.raises(PrivacyError, match=r"accountant='rdp' has no bound for Laplace noise with sample_rate=0\.1"):
        epsilon([laplace(2.0, 0.1)], 1e-5, "rdp")
    assert not has_rdp([laplace(2.0), laplace(2.0, 0.1)])
    assert has_rdp([laplace(2.0), PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=1)])
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(laplace(10.0, steps=100).to_dp_event())
    by_rdp = epsilon([laplace(10.0, steps=100)], 1e-5, "rdp")
    assert by_rdp == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert by_rdp > epsilon([laplace(10.0, steps=100)], 1e-5)
    (row,) = epsilon_table(2.0, 0.1, 4, [1], 1e-5, LAPLACE)
    assert row.epsilon_rdp is None
    assert row.epsilon_pld == epsilon([laplace(2.0, 0.1, 4)], 1e-5)


@pytest.mark.parametrize(("target", "sample_rate", "steps"), [(1.0, 1.0, 10), (3.0, 0.05, 200)])
def test_calibration_finds_the_scale(target, sample_rate, steps):
    noise = noise_multiplier_for(target, 1e-5, sample_rate, steps, kind=LAPLACE)
    assert epsilon([laplace(noise, sample_rate, steps)], 1e-5) <= target
    assert epsilon([laplace(noise / 1.002, sample_rate, steps)], 1e-5) > target


def test_without_noise_there_is_no_protection_and_with_little_sampling_is_ignored():
    assert epsilon([laplace(0.0, 0.1)], 1e-5) == math.inf
    assert epsilon([laplace(0.005, 0.1, 2)], 1e-5) == pytest.approx(2 * math.log1p(0.1 * math.expm1(200)))


def test_events_of_both_kinds_compose_and_stay_apart():
    gaussian = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.1, steps=10)
    history = merge([gaussian, laplace(2.0, 0.1, 10), laplace(2.0, 0.1, 5)])
    assert history == (gaussian, laplace(2.0, 0.1, 15))
    both = epsilon(history, 1e-5)
    assert max(epsilon([one], 1e-5) for one in history) < both
    assert both < epsilon([gaussian], 1e-5) + 15 * math.log1p(0.1 * math.expm1(0.5))
    tiny = epsilon([gaussian, laplace(0.005)], 1e-5)
    assert tiny == pytest.approx(200 + epsilon([PrivacyEvent(noise_multiplier=2.0, sample_rate=1.0, steps=10)], 1e-5))
    assert len(dominant([(gaussian,), (laplace(2.0, 0.1, 10),)])) == 2


def test_a_ledger_keeps_the_kind_on_disk(tmp_path):
    gaussian = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.1, steps=3)
    with PrivacyLedger(tmp_path / "ledger.sqlite") as ledger:
        ledger.charge(0, 1, 0, gaussian)
        ledger.charge(1, 1, 0, laplace(2.0, 0.1, 3))
    with PrivacyLedger(tmp_path / "ledger.sqlite", must_exist=True) as ledger:
        assert ledger.privacy_unit == "example"
        assert ledger.histories() == {0: (gaussian,), 1: (laplace(2.0, 0.1, 3),)}
        assert ledger.epsilon_by_client(1e-5)[1] == epsilon([laplace(2.0, 0.1, 3)], 1e-5)
    assert PrivacyEvent.from_dict(laplace(2.0).to_dict()) == laplace(2.0)


def test_behind_a_coin_one_unsampled_step_is_a_sampled_one():
    found = epsilon_released(laplace(2.0), {0.1: 20}, 1e-5)
    assert found == pytest.approx(epsilon([laplace(2.0, 0.1, 20)], 1e-5), rel=5e-3)
    assert found < epsilon_released(laplace(2.0), {0.1: 20}, 1e-5, "rdp") <= epsilon([laplace(2.0, 1, 20)], 1e-5, "rdp")
    assert epsilon_released(laplace(2.0, 0.5), {0.1: 20}, 1e-13) <= epsilon([laplace(2.0, 0.5, 20)], 1e-13)
