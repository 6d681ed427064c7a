"""Epsilon by others: dp_accounting, Opacus and Flower's own accountant, over random histories, within their errors.

``test_accountant`` and ``test_pld`` have the cases by hand; here are mixed histories, and what holds for any of them.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import NeighboringRelation as Relation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant as DpAccountingRdp
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp

from fed_dpsat.accounting import PrivacyEvent, epsilon, merge
from fed_dpsat.accounting.accountant import one_step_rdp

DRAW = np.random.default_rng(0)
GRID = [
    (
        float(DRAW.uniform(0.7, 6)),
        int(DRAW.integers(5, 500)),
        int(DRAW.integers(1, 2000)),
        float(10 ** DRAW.uniform(-7, -3)),
    )
    for _ in range(12)
]
POPULATION = 1000


def some(cases, count):
    """``cases``, of which all but the first ``count`` are slow."""
    slow = (case if isinstance(case, tuple) else (case,) for case in cases[count:])
    return [*cases[:count], *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


def flowers(sampling=SamplingMethod.POISSON):
    """An empty accountant of Flower's."""
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    if sampling is SamplingMethod.WITHOUT_REPLACEMENT:
        relation = NeighboringRelation.REPLACE_ONE
    return RdpAccountant(
        PrivacyConfig(
            target_delta=1e-5, population_size=POPULATION, neighboring_relation=relation, sampling_method=sampling
        )
    )


@pytest.mark.parametrize(("noise", "sample", "steps", "delta"), some(GRID, 3))
def test_flowers_rdp_accountant_agrees(noise, sample, steps, delta):
    theirs = flowers()
    theirs.compose(GaussianPrivacyEvent(noise_multiplier=noise, sample_size=sample, population_size=POPULATION), steps)
    event = PrivacyEvent(noise_multiplier=noise, sample_rate=sample / POPULATION, steps=steps)
    assert epsilon([event], delta, "rdp") == pytest.approx(theirs.get_epsilon(delta), rel=1e-6)
    assert epsilon([event], delta) <= theirs.get_epsilon(delta) * (1 + 1e-3)


def random_history(seed):
    """Two or three kinds of release, and a delta; rates are multiples of 1 / POPULATION."""
    draw = random.Random(seed)
    events = [
        PrivacyEvent(
            noise_multiplier=10 ** draw.uniform(-0.1, 0.9),
            sample_rate=draw.choice([*range(2, 302, 10), *[POPULATION] * 6]) / POPULATION,
            steps=int(10 ** draw.uniform(0, 2.5)),
        )
        for _ in range(draw.choice([2, 3]))
    ]
    return events, 10 ** draw.uniform(-7, -3)


SEEDS = some(range(6), 2)
ORDERS = np.asarray(DpAccountingRdp().orders)


@functools.cache
def flower_says(seed):
    """``by_flower`` of ``random_history``."""
    return by_flower(*random_history(seed))


def by_flower(events, delta, sampling=SamplingMethod.POISSON):
    theirs = flowers(sampling)
    for event in events:
        sample = round(event.sample_rate * POPULATION)
        release = GaussianPrivacyEvent(
            noise_multiplier=event.noise_multiplier, sample_size=sample, population_size=POPULATION
        )
        theirs.compose(release, event.steps)
    return theirs.get_epsilon(delta)


def by_opacus_rdp(events, delta):
    theirs = RDPAccountant()
    theirs.history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in events]
    return theirs.get_epsilon(delta, alphas=list(ORDERS))


def by_dp_accounting(accountant, events, delta):
    for event in events:
        accountant.compose(event.to_dp_event())
    return accountant.get_epsilon(delta)


@pytest.mark.by_default("0")
@pytest.mark.parametrize("seed", SEEDS)
def test_three_rdp_accountants_agree_on_mixed_histories(seed):
    events, delta = random_history(seed)
    ours = epsilon(events, delta, "rdp")
    assert ours == pytest.approx(flower_says(seed), rel=1e-9)
    assert ours == pytest.approx(by_dp_accounting(DpAccountingRdp(), events, delta), rel=1e-9)
    # At fractional orders dp_accounting adds the series' absolute values: an upper bound, where Opacus is exact.
    theirs = by_opacus_rdp(events, delta)
    assert theirs * (1 - 1e-6) <= ours <= theirs * 1.02


@pytest.mark.parametrize("seed", SEEDS)
def test_divergences_are_opacus_own_at_whole_orders_and_never_below(seed):
    for event in random_history(seed)[0]:
        ours = one_step_rdp(event.noise_multiplier, event.sample_rate)
        theirs = compute_rdp(
            q=event.sample_rate, noise_multiplier=event.noise_multiplier, steps=1, orders=ORDERS.tolist()
        )
        assert (ours >= theirs * (1 - 1e-6) - 1e-12).all()
        whole = ORDERS % 1 == 0
        np.testing.assert_allclose(ours[whole], theirs[whole], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_opacus_prv_encloses_mixed_histories(seed):
    """Its answer is above the true epsilon by at most twice its eps_error."""
    events, delta = random_history(seed)
    theirs = PRVAccountant()
    theirs.history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in events]
    upper, ours = theirs.get_epsilon(delta, eps_error=0.01), epsilon(events, delta)
    assert upper - 2 * 0.01 - 1e-3 <= ours <= upper * (1 + 3e-4)


@pytest.mark.parametrize("seed", some(range(4), 2))
def test_dp_accountings_default_grid_is_no_tighter(seed):
    """Its losses are multiples of 1e-4, ours of a grid that fits: both are upper bounds of one value."""
    events, delta = random_history(seed)
    assert epsilon(events, delta) == pytest.approx(by_dp_accounting(PLDAccountant(), events, delta), rel=2e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_references_tell_wrong_accounting_apart(seed):
    """An event forgotten, one noise for all, half the rate, the mean of the rates: none is within the errors."""
    events, delta = random_history(seed)
    truth = flower_says(seed)
    most_noise = max(event.noise_multiplier for event in events)
    mean_rate = sum(event.sample_rate for event in events) / len(events)
    wrong = {
        "forgotten": events[1:],
        "one noise": [replace(event, noise_multiplier=most_noise) for event in events],
        "half the rate": [replace(event, sample_rate=event.sample_rate / 2) for event in events],
        "mean rate": [replace(event, sample_rate=mean_rate) for event in events],
    }
    for name, history in wrong.items():
        assert epsilon(history, delta, "rdp") != pytest.approx(truth, rel=1e-4), name


def test_adjacency_is_add_or_remove_in_every_accountant():
    """Replacing an example is a stronger claim and costs more; nothing here makes it."""
    event = PrivacyEvent(noise_multiplier=4.0, sample_rate=1.0, steps=4)
    for name, make in ("pld", PLDAccountant), ("rdp", DpAccountingRdp):
        added = by_dp_accounting(make(neighboring_relation=Relation.ADD_OR_REMOVE_ONE), [event], 1e-5)
        assert epsilon([event], 1e-5, name) == pytest.approx(added, rel=1e-4)
    sampled, _ = random_history(0)
    replaced = by_flower(sampled, 1e-5, SamplingMethod.WITHOUT_REPLACEMENT)
    assert replaced > 1.2 * epsilon(sampled, 1e-5, "rdp")


EVENTS = st.lists(
    st.builds(
        PrivacyEvent,
        noise_multiplier=st.sampled_from([0.8, 1.0, 2.5, 6.0]),
        sample_rate=st.sampled_from([0.005, 0.05, 0.3, 1.0]),
        steps=st.integers(1, 200),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=6)
@given(events=EVENTS, cut=st.floats(0.01, 0.99), data=st.data())
def test_splitting_ordering_and_merging_change_nothing(events, cut, data):
    parts = []
    for event in events:
        first = max(1, round(cut * event.steps))
        for steps in (first, event.steps - first):
            if steps:
                parts.append(replace(event, steps=steps))
    shuffled = data.draw(st.permutations(parts))
    for name in ("pld", "rdp"):
        whole = epsilon(events, 1e-5, name)
        assert epsilon(shuffled, 1e-5, name) == whole
        assert epsilon(merge(shuffled), 1e-5, name) == whole


@pytest.mark.slow
@settings(max_examples=10)
@given(events=EVENTS, delta=st.sampled_from([1e-3, 1e-5, 1e-7]), more=st.floats(1.05, 2))
def test_mixed_histories_are_monotone_and_pld_is_at_most_rdp(events, delta, more):
    last, rest = events[-1], events[:-1]

    def instead(**change):
        return [*rest, replace(last, **change)]

    pld, rdp = epsilon(events, delta), epsilon(events, delta, "rdp")
    assert pld <= rdp * (1 + 1e-3)
    for name, base in ("pld", pld), ("rdp", rdp):
        least = base * (1 - 1e-3)
        assert epsilon(rest, delta, name) <= base * (1 + 1e-3)
        assert epsilon(instead(steps=last.steps + 20), delta, name) >= least
        assert epsilon(instead(sample_rate=min(1.0, last.sample_rate * more)), delta, name) >= least
        assert epsilon(instead(noise_multiplier=last.noise_multiplier / more), delta, name) >= least
        assert epsilon(events, delta / 10, name) >= base
