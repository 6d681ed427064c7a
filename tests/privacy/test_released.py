"""Epsilon of the released models: the coin is tossed once a round, not once a step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from fed_dpsat.privacy import PrivacyError, PrivacyEvent, epsilon
from fed_dpsat.privacy import released as module
from fed_dpsat.privacy.released import ASSUMPTIONS, epsilon_released

FULL_BATCH = PrivacyEvent(noise_multiplier=5.0, sample_rate=1.0, steps=20)
SAMPLED = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=5)


def shortcut(event, rounds, client_rate, delta, accountant="pld"):
    """Wrong: every step is taken to have a coin of its own."""
    rate = client_rate * event.sample_rate
    step = PrivacyEvent(noise_multiplier=event.noise_multiplier, sample_rate=rate, steps=event.steps * rounds)
    return epsilon([step], delta, accountant)


@pytest.mark.parametrize(
    ("accountant", "exact", "wrong", "server"), [("pld", 5.74, 3.92, 77.3), ("rdp", 6.43, 4.24, 81.1)]
)
def test_the_reviewers_numbers_and_the_shortcut_that_misses_them(accountant, exact, wrong, server):
    ours = epsilon_released(FULL_BATCH, 100, 0.1, 1e-5, accountant)
    assert ours == pytest.approx(exact, abs=0.006)
    short = shortcut(FULL_BATCH, 100, 0.1, 1e-5, accountant)
    assert short == pytest.approx(wrong, abs=0.006)
    assert short < 0.7 * ours
    assert epsilon([FULL_BATCH] * 100, 1e-5, accountant) == pytest.approx(server, abs=0.06)


@pytest.mark.parametrize(
    ("sigma", "rate", "delta"), [(1.0, 0.1, 1e-5), (0.7, 0.5, 1e-6), (2.0, 0.3, 1e-4), (1.5, 0.9, 1e-3)]
)
def test_one_round_against_integrated_densities(sigma, rate, delta):
    """Oracle: hockey-stick divergences of the mixture of two normals, both directions, by quadrature."""
    gone, there = stats.norm(0, sigma).pdf, stats.norm(1, sigma).pdf

    def mixture(x):
        return (1 - rate) * gone(x) + rate * there(x)

    def divergence(first, second, eps):
        return integrate.quad(lambda x: max(0.0, first(x) - math.exp(eps) * second(x)), -12, 14, limit=800)[0]

    def excess(eps):
        return max(divergence(mixture, gone, eps), divergence(gone, mixture, eps)) - delta

    truth = optimize.brentq(excess, 0.0, 30.0, xtol=1e-7)
    ours = epsilon_released(PrivacyEvent(noise_multiplier=sigma, sample_rate=1.0, steps=1), 1, rate, delta)
    assert truth * (1 - 1e-4) <= ours <= truth * 1.003 + 1e-4


@pytest.mark.parametrize("rounds", [1, 30])
def test_one_unsampled_step_per_round_is_poisson_sampling(rounds):
    step = PrivacyEvent(noise_multiplier=1.2, sample_rate=1.0, steps=1)
    direct = epsilon([PrivacyEvent(noise_multiplier=1.2, sample_rate=0.2, steps=rounds)], 1e-5)
    assert epsilon_released(step, rounds, 0.2, 1e-5) == pytest.approx(direct, rel=2e-3)


def test_one_sampled_step_per_round_is_sampling_at_the_product_of_rates():
    step = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1)
    direct = epsilon([PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=50)], 1e-5)
    assert epsilon_released(step, 50, 0.2, 1e-5) == pytest.approx(direct, rel=2e-3)


def test_a_coin_that_always_falls_is_no_coin():
    assert epsilon_released(SAMPLED, 10, 1.0, 1e-5) == epsilon([SAMPLED] * 10, 1e-5)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_never_above_the_server_and_monotone(accountant):
    def of(event=SAMPLED, rounds=20, rate=0.2):
        return epsilon_released(event, rounds, rate, 1e-5, accountant)

    base = of()
    assert base < epsilon([SAMPLED] * 20, 1e-5, accountant)
    assert of(rate=0.3) > base
    assert of(rounds=30) > base
    assert of(PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=6)) > base
    assert of(PrivacyEvent(noise_multiplier=1.1, sample_rate=0.1, steps=5)) < base


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_rdp_is_not_below_pld(rate):
    for event in (FULL_BATCH, SAMPLED):
        assert epsilon_released(event, 20, rate, 1e-5, "rdp") >= epsilon_released(event, 20, rate, 1e-5) * (1 - 1e-3)


def test_mass_is_kept_under_both_measures():
    losses, probabilities = np.array([-0.31, 0.0, 0.77]), np.array([0.2, 0.5, 0.3])
    pmf = module._on_grid(losses, probabilities, 0.0, 0.25)
    points = (pmf._lower_loss + np.arange(pmf.size)) * 0.25
    assert pmf._probs.sum() == pytest.approx(1.0)
    assert pmf._probs @ np.exp(-points) == pytest.approx(probabilities @ np.exp(-losses))
    assert (pmf._probs >= 0).all()


def test_one_direction_alone_would_claim_too_little(monkeypatch):
    """The wrong version: only example added."""
    right = epsilon_released(FULL_BATCH, 100, 0.1, 1e-5)
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    mixed = module._mixed
    monkeypatch.setattr(module, "_mixed", lambda *a: PrivacyLossDistribution(mixed(*a)._pmf_add))
    assert epsilon_released(FULL_BATCH, 100, 0.1, 1e-5) < 0.9 * right


def test_no_noise_is_no_protection():
    assert epsilon_released(PrivacyEvent(noise_multiplier=0.0, sample_rate=0.5, steps=1), 3, 0.1, 1e-5) == math.inf


@pytest.mark.parametrize(("rounds", "rate"), [(0, 0.5), (1, 0.0), (1, 1.1), (1, math.nan)])
def test_what_makes_no_sense_is_refused(rounds, rate):
    with pytest.raises(PrivacyError):
        epsilon_released(SAMPLED, rounds, rate, 1e-5)


def test_the_assumptions_name_what_undoes_them():
    for words in ("released models alone", "kept secret", "other examples", "server's epsilon"):
        assert words in ASSUMPTIONS
