"""Epsilon of the released models: the coin is tossed once a round, not once a step."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from fed_dpsat.accounting import PrivacyError, PrivacyEvent, epsilon, pld
from fed_dpsat.accounting import released as module
from fed_dpsat.accounting.released import ASSUMPTIONS, Cohort, epsilon_of_models, epsilon_released

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
    ours = epsilon_released(FULL_BATCH, {0.1: 100}, 1e-5, accountant)
    assert ours == pytest.approx(exact, abs=0.006)
    short = shortcut(FULL_BATCH, 100, 0.1, 1e-5, accountant)
    assert short == pytest.approx(wrong, abs=0.006)
    assert short < 0.7 * ours
    assert epsilon([FULL_BATCH] * 100, 1e-5, accountant) == pytest.approx(server, abs=0.06)


@pytest.mark.parametrize(
    ("sigma", "rate", "delta"),
    [
        *[(1.0, 0.1, 1e-5), (1.5, 0.9, 1e-3)],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0.7, 0.5, 1e-6), (2.0, 0.3, 1e-4)]),
    ],
)
def test_one_round_against_integrated_densities(sigma, rate, delta):
    """Oracle: hockey-stick divergences of the mixture of two normals, both directions, by the trapezoid rule."""
    x, cell = np.linspace(-12 * sigma, 1 + 12 * sigma, 400_001, retstep=True)
    gone, there = stats.norm(0, sigma).pdf(x), stats.norm(1, sigma).pdf(x)
    mixture = (1 - rate) * gone + rate * there

    def divergence(first, second, eps):
        return np.maximum(first - math.exp(eps) * second, 0).sum() * cell

    def excess(eps):
        return max(divergence(mixture, gone, eps), divergence(gone, mixture, eps)) - delta

    truth = optimize.brentq(excess, 0.0, 30.0, xtol=1e-7)
    ours = epsilon_released(PrivacyEvent(noise_multiplier=sigma, sample_rate=1.0, steps=1), {rate: 1}, delta)
    assert truth * (1 - 1e-4) <= ours <= truth * 1.003 + 1e-4


def two_sampled_steps(sigma, rate, points=801):
    """Densities on a grid of pairs of releases, with the example and without it, and the area of a cell."""
    x, cell = np.linspace(-9 * sigma, 1 + 9 * sigma, points, retstep=True)
    gone, there = stats.norm(0, sigma).pdf(x), stats.norm(1, sigma).pdf(x)
    step = (1 - rate) * gone + rate * there
    return np.outer(step, step), np.outer(gone, gone), cell**2


TWO_STEPS = [(1.0, 0.3, 0.2, 1e-5), (0.7, 0.5, 0.1, 1e-6), (2.0, 0.9, 0.6, 1e-4), (0.6, 0.2, 0.05, 1e-7)]


@functools.cache
def epsilon_of_two_steps(sigma, rate, client_rate, delta):
    """Oracle: both directions of the mixture's hockey stick, summed over the plane."""
    there, gone, area = two_sampled_steps(sigma, rate)
    mixed = client_rate * there + (1 - client_rate) * gone

    def excess(eps):
        pairs = (mixed, gone), (gone, mixed)
        return max(np.maximum(one - math.exp(eps) * other, 0).sum() for one, other in pairs) * area - delta

    return optimize.brentq(excess, 0.0, 30.0, xtol=1e-7)


@pytest.mark.parametrize(("sigma", "rate", "client_rate", "delta"), TWO_STEPS)
def test_two_sampled_steps_against_their_densities_on_the_plane(sigma, rate, client_rate, delta):
    event = PrivacyEvent(noise_multiplier=sigma, sample_rate=rate, steps=2)
    truth = epsilon_of_two_steps(sigma, rate, client_rate, delta)
    assert truth * (1 - 1e-5) <= epsilon_released(event, {client_rate: 1}, delta) <= truth * (1 + 1e-3)
    assert shortcut(event, 1, client_rate, delta) < 0.9 * truth


@pytest.mark.parametrize(("sigma", "rate", "client_rate", "delta"), TWO_STEPS)
def test_rdp_bounds_the_divergences_of_both_directions(sigma, rate, client_rate, delta):
    x, width = np.linspace(-40 * sigma, 40 * sigma + 12, 601, retstep=True)
    gone, there = stats.norm(0, sigma).logpdf(x), stats.norm(1, sigma).logpdf(x)
    step = np.logaddexp(math.log(1 - rate) + gone, math.log(rate) + there)
    gone, there = np.add.outer(gone, gone), np.add.outer(step, step)
    mixed = np.logaddexp(math.log(1 - client_rate) + gone, math.log(client_rate) + there)

    def divergence(one, other, order):
        return (special.logsumexp(order * one + (1 - order) * other) + 2 * math.log(width)) / (order - 1)

    of_steps = {order: divergence(there, gone, order) for order in range(2, 9)}
    for order in of_steps:
        bound = module._sampled_rdp(order, client_rate, of_steps)
        removed, added = divergence(mixed, gone, order), divergence(gone, mixed, order)
        assert max(removed, added) - 1e-9 <= bound <= removed + math.log(3) / (order - 1) + 1e-9


@pytest.mark.parametrize(
    ("sigma", "steps", "client_rate", "rounds", "delta"),
    [
        (5.0, 20, 0.1, 100, 1e-5),
        (5.0, 20, 0.1, 100, 1e-10),
        (1.0, 20, 0.1, 100, 1e-5),  # 211; 1e-22 of rounding in the tail of a round must not grow to 1031
        (2.0, 33, 1.3e-3, 757, 4e-6),  # 12.5
        (0.3, 2, 0.15, 8, 1e-5),
        (4.64, 186, 0.83, 649, 3.6e-5),  # 2436: exp of it overflows
        (4.0, 30, 0.5, 1980, 1e-5),  # 721, where dp_accounting's search for epsilon says inf
        (0.1, 20, 0.1, 10, 1e-5),  # a loss of a thousand, which exp does not hold
        (1e4, 3, 1e-6, 10, 1e-5),
    ],
)
def test_a_round_of_full_batches_is_one_gaussian_behind_the_coin(sigma, steps, client_rate, rounds, delta):
    """Oracle: ``epsilon`` of as many Poisson-sampled Gaussians with noise sigma / sqrt(steps)."""
    event = PrivacyEvent(noise_multiplier=sigma, sample_rate=1.0, steps=steps)
    one = PrivacyEvent(noise_multiplier=sigma / math.sqrt(steps), sample_rate=client_rate, steps=rounds)
    direct = epsilon([one], delta)
    ours = epsilon_released(event, {client_rate: rounds}, delta)
    assert direct * (1 - 1e-3) <= ours <= direct * (1 + 1e-3)


@pytest.mark.parametrize("rounds", [1, 30])
def test_one_unsampled_step_per_round_is_poisson_sampling(rounds):
    step = PrivacyEvent(noise_multiplier=1.2, sample_rate=1.0, steps=1)
    direct = epsilon([PrivacyEvent(noise_multiplier=1.2, sample_rate=0.2, steps=rounds)], 1e-5)
    assert epsilon_released(step, {0.2: rounds}, 1e-5) == pytest.approx(direct, rel=2e-3)


def test_one_sampled_step_per_round_is_sampling_at_the_product_of_rates():
    step = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1)
    direct = epsilon([PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=50)], 1e-5)
    assert epsilon_released(step, {0.2: 50}, 1e-5) == pytest.approx(direct, rel=2e-3)


COIN_CASES = [(2, 0.25, 1.0, 1e-4), (4, 0.25, 2.0, 1e-4), (3, 0.4, 0.8, 1e-5), (1, 0.3, 1.0, 1e-4)]
"""Clients, coin, noise, delta."""


def worlds(clients, coin, rounds):
    """Every way that coins of all clients fall in all rounds, with its probability: the cohort of each round."""
    subsets = [s for size in range(clients + 1) for s in itertools.combinations(range(clients), size)]
    chance = {s: coin ** len(s) * (1 - coin) ** (clients - len(s)) for s in subsets}
    for cohorts in itertools.product(subsets, repeat=rounds):
        yield cohorts, math.prod(chance[s] for s in cohorts)


def epsilon_of_two_rounds(clients, coin, sigma, delta, tells):
    """Oracle: client 0 moves the model by 1 if its example is there; the model is seen, and what ``tells`` of a cohort.

    Both rounds moved it. Both directions of the hockey stick, on the plane of the two releases, given what was told:
    the worst of it. Coins and cohorts are listed one by one; no formula of a chance is used.
    """
    x, cell = np.linspace(-9 * sigma, 1 + 9 * sigma, 301, retstep=True)
    moved = {took_part: stats.norm(took_part, sigma).pdf(x) for took_part in (0, 1)}
    told = {}
    for cohorts, probability in worlds(clients, coin, 2):
        if not all(cohorts) or tells(cohorts) is None:
            continue
        there, gone, mass = told.get(tells(cohorts), (0.0, 0.0, 0.0))
        first, second = (moved[int(0 in cohort)] for cohort in cohorts)
        told[tells(cohorts)] = (
            there + probability * np.outer(first, second),
            gone + probability * np.outer(moved[0], moved[0]),
            mass + probability,
        )

    def epsilon_given(there, gone, mass):
        def excess(eps):
            pairs = (there, gone), (gone, there)
            given = max(np.maximum(one - math.exp(eps) * other, 0).sum() for one, other in pairs) * cell**2 / mass
            return given - delta

        return optimize.brentq(excess, 0.0, 40.0, xtol=1e-7)

    return {what: epsilon_given(*seen) for what, seen in told.items()}


@pytest.mark.parametrize(("clients", "coin", "sigma", "delta"), COIN_CASES)
def test_an_observer_who_sees_that_rounds_were_not_empty_against_all_coins_listed(clients, coin, sigma, delta):
    truth = epsilon_of_two_rounds(clients, coin, sigma, delta, tells=lambda cohorts: "not empty")["not empty"]
    event = PrivacyEvent(noise_multiplier=sigma, sample_rate=1.0, steps=1)
    chance = coin / (1 - (1 - coin) ** clients)
    ours = epsilon_released(event, {chance: 2}, delta)
    assert truth * (1 - 1e-4) <= ours <= truth * (1 + 2e-3) + 1e-4
    assert epsilon_released(event, {coin: 2}, delta) < 0.95 * truth  # the wrong version: the coin's own chance
    of_models = epsilon_of_models(event, [Cohort(1, clients)] * 2, coin, delta)
    assert of_models >= ours * (1 - 1e-9)  # whatever the sizes were


def sizes_of(cohorts):
    first, second = map(len, cohorts)
    return (first, second) if first <= second else None  # the other order costs the same


@pytest.mark.parametrize(("clients", "coin", "sigma", "delta"), COIN_CASES[:-1])
def test_an_observer_who_counts_cohorts_against_all_coins_listed(clients, coin, sigma, delta):
    event = PrivacyEvent(noise_multiplier=sigma, sample_rate=1.0, steps=1)
    by_sizes = epsilon_of_two_rounds(clients, coin, sigma, delta, tells=sizes_of)
    for sizes, truth in by_sizes.items():
        chances = {}
        for size in sizes:
            chances[size / clients] = chances.get(size / clients, 0) + 1
        assert truth * (1 - 1e-4) <= epsilon_released(event, chances, delta) <= truth * (1 + 2e-3) + 1e-4
        empty = Cohort(0, clients)
        ours = epsilon_of_models(event, [*(Cohort(size, clients) for size in sizes), empty], coin, delta)
        assert ours >= truth * (1 - 1e-4)
    chance = coin / (1 - (1 - coin) ** clients)  # the wrong version: one that does not grow with what is told
    assert epsilon_released(event, {chance: 2}, delta) < 0.9 * by_sizes[clients, clients]


def test_four_clients_by_hand():
    """12 rounds at sigma 2, 10 of them not empty: 1.81 was claimed, as if an empty round could not be told."""
    event = PrivacyEvent(noise_multiplier=2.0, sample_rate=1.0, steps=1)
    assert epsilon_released(event, {0.25: 12}, 1e-4) == pytest.approx(1.81, abs=0.005)
    right = epsilon_released(event, {0.25 / (1 - 0.75**4): 10}, 1e-4)
    assert right == pytest.approx(2.45, abs=0.005)
    ones = [*[Cohort(1, 4)] * 10, *[Cohort(0, 4)] * 2]
    assert epsilon_of_models(event, ones, 0.25, 1e-4) == pytest.approx(right, rel=1e-9)
    as_expected = [*[Cohort(1, 4)] * 6, *[Cohort(2, 4)] * 3, Cohort(3, 4), *[Cohort(0, 4)] * 2]
    assert epsilon_of_models(event, as_expected, 0.25, 1e-4) == pytest.approx(3.17, abs=0.005)
    everybody = [Cohort(4, 4)] * 10
    assert epsilon_of_models(event, everybody, 0.25, 1e-4) == epsilon([event] * 10, 1e-4)
    assert epsilon_of_models(event, [Cohort(0, 4)] * 12, 0.25, 1e-4) == 0
    with pytest.raises(PrivacyError, match="client_rate=0 is not in"):
        epsilon_of_models(event, ones, 0, 1e-4)


def means_of_sets(clients, coin):
    """Each set of numbers from 1 with E[M | M in it], every one listed."""
    chance = {m: math.comb(clients, m) * coin**m * (1 - coin) ** (clients - m) for m in range(1, clients + 1)}
    for size in range(1, clients + 1):
        for told in itertools.combinations(chance, size):
            yield told, sum(m * chance[m] for m in told) / sum(chance[m] for m in told)


@pytest.mark.parametrize("coin", [0.01, 0.25, 0.6, 0.99])
@pytest.mark.parametrize("clients", [1, 2, 4, 9])
def test_the_chance_is_the_largest_over_every_set_that_an_observer_may_tell(clients, coin):
    means = list(means_of_sets(clients, coin))
    for asked in range(1, clients + 1):
        largest = max(mean for told, mean in means if asked in told)
        assert module.chance_given(coin, asked, clients) == pytest.approx(largest / clients, rel=1e-12)


def test_an_observer_who_tells_all_from_fewer_has_more_than_either_of_two_others():
    """The wrong version took the larger epsilon of who counts and who tells that somebody took part: 3.65."""
    event = PrivacyEvent(noise_multiplier=2.0, sample_rate=1.0, steps=1)
    fewer = dict(means_of_sets(4, 0.25))[1, 2, 3] / 4
    truth = epsilon_released(event, {1.0: 3, fewer: 9}, 1e-4)
    counts = epsilon_released(event, {1.0: 3, 0.25: 9}, 1e-4)
    somebody = epsilon_released(event, {0.25 / (1 - 0.75**4): 12}, 1e-4)
    assert max(counts, somebody) == pytest.approx(3.65, abs=0.005)
    assert truth == pytest.approx(4.09, abs=0.005)
    assert epsilon_of_models(event, [*[Cohort(4, 4)] * 3, *[Cohort(1, 4)] * 9], 0.25, 1e-4) >= truth


def test_every_observer_of_two_rounds_against_all_coins_listed():
    """Each way to put 1, 2 and 3 of three clients in sets, and each pair of rounds: all coins listed, no formula."""
    event = PrivacyEvent(noise_multiplier=0.8, sample_rate=1.0, steps=1)
    for sets in ({1: 1, 2: 1, 3: 3}, {1: 1, 2: 2, 3: 1}, {1: 1, 2: 2, 3: 2}):
        found = epsilon_of_two_rounds(3, 0.4, 0.8, 1e-5, lambda cohorts, s=sets: tuple(s[len(c)] for c in cohorts))
        for first, second in itertools.combinations_with_replacement(sets, 2):
            ours = epsilon_of_models(event, [Cohort(first, 3), Cohort(second, 3)], 0.4, 1e-5)
            assert found[sets[first], sets[second]] * (1 - 1e-4) <= ours


def test_a_chance_among_many_clients_is_one():
    asked = [1, 7, 100, 1000, 99_999]
    chances = [module.chance_given(0.001, m, 100_000) for m in asked]
    assert all(m / 100_000 <= chance <= 1 for m, chance in zip(asked, chances, strict=True))
    assert module.chance_given(0.001, 100, 100_000) < 1.2e-3  # 1.13e-3: who tells 100 and more from fewer
    assert module.chance_given(1.0, 5, 5) == 1


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_rounds_of_several_chances_lie_between_those_of_the_least_and_of_the_most(accountant):
    def of(chances, event=SAMPLED):
        return epsilon_released(event, chances, 1e-5, accountant)

    assert of({0.1: 10}) < of({0.1: 5, 0.3: 5}) < of({0.1: 2, 0.3: 8}) < of({0.3: 10})
    assert of({0.3: 10}) < of({0.3: 5, 1.0: 5}) < of({1.0: 10})
    assert of({0.3: 5, 1.0: 5}) > of({1.0: 5})
    full = PrivacyEvent(noise_multiplier=1.5, sample_rate=1.0, steps=1)
    steps = [PrivacyEvent(noise_multiplier=1.5, sample_rate=rate, steps=4) for rate in (0.2, 1.0)]
    assert of({0.2: 4, 1.0: 4}, full) == pytest.approx(epsilon(steps, 1e-5, accountant), rel=2e-3)


def test_many_chances_are_rounded_up_to_a_few(monkeypatch):
    chances = {(10 + i) / 100: 1 + i % 3 for i in range(11)}
    monkeypatch.setattr(module, "MOST_CHANCES", 4)
    few = module._fewer(chances)
    assert len(few) == 4
    assert sum(few.values()) == sum(chances.values())
    assert set(few) < set(chances)
    ours = epsilon_released(SAMPLED, chances, 1e-5)
    monkeypatch.setattr(module, "MOST_CHANCES", 11)
    exact = epsilon_released(SAMPLED, chances, 1e-5)
    assert exact < ours < 1.1 * exact


def test_a_coin_that_always_falls_is_no_coin():
    assert epsilon_released(SAMPLED, {1.0: 10}, 1e-5) == epsilon([SAMPLED] * 10, 1e-5)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_never_above_the_server_and_monotone(accountant):
    def of(event=SAMPLED, rounds=20, rate=0.2):
        return epsilon_released(event, {rate: rounds}, 1e-5, accountant)

    base, server = of(), epsilon([SAMPLED] * 20, 1e-5, accountant)
    assert base < server
    assert of(rate=0.999) <= server  # the bound for any mechanism alone says 11.8, where the server has 7.9
    assert of(rate=0.3) > base
    assert of(rounds=30) > base
    assert of(PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=6)) > base
    assert of(PrivacyEvent(noise_multiplier=1.1, sample_rate=0.1, steps=5)) < base


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_rdp_is_not_below_pld(rate):
    for event in (FULL_BATCH, SAMPLED):
        assert epsilon_released(event, {rate: 20}, 1e-5, "rdp") >= epsilon_released(event, {rate: 20}, 1e-5) * (
            1 - 1e-3
        )


@settings(max_examples=4)
@given(
    noise_multiplier=st.floats(0.5, 20),
    sample_rate=st.sampled_from([1.0, 0.5, 0.1, 0.01]),
    steps=st.integers(1, 40),
    rounds=st.integers(1, 300),
    client_rate=st.floats(0.001, 0.99),
    more=st.floats(1.05, 2),
)
def test_any_schedule_is_monotone_and_between_nothing_and_the_server(
    noise_multiplier, sample_rate, steps, rounds, client_rate, more
):
    def of(noise=noise_multiplier, steps=steps, rounds=rounds, rate=client_rate, accountant="pld"):
        event = PrivacyEvent(noise_multiplier=noise, sample_rate=sample_rate, steps=steps)
        return epsilon_released(event, {rate: rounds}, 1e-5, accountant)

    base, slack = of(), 1 - 1e-3
    whole = PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
    assert 0 <= base <= epsilon([whole] * rounds, 1e-5)
    assert base <= of(accountant="rdp") * (1 + 1e-3)
    assert of(noise=noise_multiplier / more) >= base * slack
    assert of(steps=steps + 1) >= base * slack
    assert of(rounds=rounds + 1) >= base * slack
    assert of(rate=min(1.0, client_rate * more)) >= base * slack


@pytest.mark.parametrize(
    ("event", "client_rate", "rounds"),
    [
        (FULL_BATCH, 0.1, 100),
        (SAMPLED, 0.2, 50),
        (PrivacyEvent(noise_multiplier=0.73, sample_rate=1.0, steps=28), 0.28, 1),
        (PrivacyEvent(noise_multiplier=4.35, sample_rate=1.0, steps=54), 0.0077, 177),
        pytest.param(PrivacyEvent(noise_multiplier=0.5, sample_rate=0.02, steps=50), 0.01, 300, marks=pytest.mark.slow),
    ],
)
def test_the_grid_costs_no_more_than_declared(monkeypatch, event, client_rate, rounds):
    ours = epsilon_released(event, {client_rate: rounds}, 1e-5)
    for owner in (module, pld):
        monkeypatch.setattr(owner, "POINTS_PER_DEVIATION", 4 * owner.POINTS_PER_DEVIATION)
    finer = epsilon_released(event, {client_rate: rounds}, 1e-5)
    assert -1e-6 < ours / finer - 1 < 1e-3


def test_losses_rounded_down_would_claim_too_little(monkeypatch):
    """The wrong version: each loss at the point below it."""
    from dp_accounting.pld.pld_pmf import DensePLDPmf

    def floored(losses, probabilities, infinite, grid):
        below = np.floor(losses / grid).astype(np.int64)
        return DensePLDPmf(grid, int(below.min()), np.bincount(below - below.min(), probabilities), infinite, True)

    monkeypatch.setattr(module, "_on_grid", floored)
    truth = epsilon_of_two_steps(*TWO_STEPS[0])
    sigma, rate, client_rate, delta = TWO_STEPS[0]
    event = PrivacyEvent(noise_multiplier=sigma, sample_rate=rate, steps=2)
    assert epsilon_released(event, {client_rate: 1}, delta) < truth * (1 - 1e-3)


@pytest.mark.parametrize(
    ("noise", "sample_rate", "steps"), [(1.0, 1.0, 20), (5.0, 1.0, 20), (0.6, 0.5, 50), (1.0, 0.1, 50), (0.1, 1.0, 20)]
)
def test_a_round_is_a_pair_of_probabilities(noise, sample_rate, steps):
    event = PrivacyEvent(noise_multiplier=noise, sample_rate=sample_rate, steps=steps)
    losses, there, there_alone, gone, gone_alone = module._pair(pld.composed((event,)))
    assert there.sum() + there_alone == pytest.approx(1, abs=1e-10)
    assert gone.sum() + gone_alone == pytest.approx(1, abs=1e-10)
    assert (np.diff(np.sort(losses)) > 0).all()
    held = (abs(losses) < 300) & (there > 0) & (gone > 0)
    np.testing.assert_allclose(np.log(there[held] / gone[held]), losses[held], atol=1e-6)


def test_a_delta_that_arithmetic_cannot_resolve_gets_the_rdp_bound():
    assert epsilon_released(FULL_BATCH, {0.1: 100}, 1e-13) == epsilon_released(FULL_BATCH, {0.1: 100}, 1e-13, "rdp")
    assert epsilon_released(FULL_BATCH, {0.1: 100}, 1e-20) == epsilon_released(FULL_BATCH, {0.1: 100}, 1e-20, "rdp")


def test_outcomes_that_only_one_side_has_by_hand():
    """P over (a, b, c, d) against Q: c happens only with the example, d only without it."""
    from dp_accounting.pld.pld_pmf import DensePLDPmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    e, rate = math.e, 0.3
    there = np.array([0.2 * e, 0.5 / e, 0.0, 0.0])
    there[2] = 1 - there.sum()  # 0.27
    gone = np.array([0.2, 0.5, 0.0, 0.3])
    one_round = PrivacyLossDistribution(
        DensePLDPmf(1.0, -1, np.array([there[1], 0.0, there[0]]), there[2], True),
        DensePLDPmf(1.0, -1, np.array([gone[0], 0.0, gone[1]]), gone[3], True),
    )
    mixed = rate * there + (1 - rate) * gone
    pair = module._pair(one_round)
    behind_coin = module._mixed(pair, rate, module._grid(pair, {rate: 1}))
    for pmf, one, other in (behind_coin._pmf_remove, mixed, gone), (behind_coin._pmf_add, gone, mixed):
        for eps in (0.0, 0.1, 0.3, 0.5, 1.0):
            exact = np.maximum(one - math.exp(eps) * other, 0).sum()
            assert exact - 1e-12 <= pmf.get_delta_for_epsilon(eps) <= exact + 2e-3
    assert behind_coin._pmf_remove._infinity_mass == pytest.approx(rate * there[2])


def test_mass_is_kept_under_both_measures():
    losses, probabilities = np.array([-0.31, 0.0, 0.77]), np.array([0.2, 0.5, 0.3])
    pmf = module._on_grid(losses, probabilities, 0.0, 0.25)
    points = (pmf._lower_loss + np.arange(pmf.size)) * 0.25
    assert pmf._probs.sum() == pytest.approx(1.0)
    assert pmf._probs @ np.exp(-points) == pytest.approx(probabilities @ np.exp(-losses))
    assert (pmf._probs >= 0).all()


def test_one_direction_alone_would_claim_too_little(monkeypatch):
    """The wrong version: only example added."""
    right = epsilon_released(FULL_BATCH, {0.1: 100}, 1e-5)
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    mixed = module._mixed
    monkeypatch.setattr(module, "_mixed", lambda *a: PrivacyLossDistribution(mixed(*a)._pmf_add))
    assert epsilon_released(FULL_BATCH, {0.1: 100}, 1e-5) < 0.9 * right


def test_no_noise_is_no_protection():
    assert epsilon_released(PrivacyEvent(noise_multiplier=0.0, sample_rate=0.5, steps=1), {0.1: 3}, 1e-5) == math.inf


@pytest.mark.parametrize(("rounds", "rate"), [(0, 0.5), (1, 0.0), (1, 1.1), (1, math.nan)])
def test_what_makes_no_sense_is_refused(rounds, rate):
    with pytest.raises(PrivacyError):
        epsilon_released(SAMPLED, {rate: rounds}, 1e-5)


def test_the_assumptions_name_what_undoes_them():
    for words in (
        "only the released models",
        "stay secret",
        "carries no state",
        "other examples",
        "epsilon of the server",
    ):
        assert words in ASSUMPTIONS
