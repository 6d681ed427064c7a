"""Who may be asked depends on ledger and plans alone, and costs what the cohort costs."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from fed_dpsat.accounting import PrivacyEvent, epsilon
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import ClientPlan
from fed_dpsat.flower import roster as roster_module
from fed_dpsat.flower.nodes import FederationOver
from fed_dpsat.flower.roster import Roster, draw_cohort, toss_cohort

ROUNDS = 3000
EVENT = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=2)
PLAN = ClientPlan(target_epsilon=epsilon([EVENT] * 2, 1e-5) + 1e-6, first_round=1, event=EVENT)


def make(ledger, plans, size=2, **settings):
    defaults = {"max_rounds_per_client": 100, "seed": 0, "client_sampling": "fixed", "min_clients": 1}
    made = Roster(plans, ledger, delta=1e-5, accountant="pld", cohort_size=size, **{**defaults, **settings})
    made.join(range(len(plans)))
    return made


@pytest.fixture
def ledger():
    with PrivacyLedger(":memory:") as opened:
        yield opened


def ask(roster, ledger, round):
    cohort, retiring = roster.cohort(round)
    ledger.charge_many(round, 0, {client: roster.plans[client].event for client in cohort})
    roster.charged(cohort, round)
    return cohort, sorted(retiring)


def test_clients_leave_when_their_budget_is_spent_and_the_run_ends(ledger):
    roster = make(ledger, [PLAN] * 3, size=3)
    assert [ask(roster, ledger, round) for round in (1, 2)] == [([0, 1, 2], [])] * 2
    with pytest.raises(FederationOver, match="0 clients have budget left before round 3"):
        roster.cohort(3)
    assert roster.retired == dict.fromkeys(range(3), 3)


def test_a_charge_that_is_repeated_is_not_counted_twice_and_another_one_is(ledger):
    plans = [PLAN, dataclasses.replace(PLAN, target_epsilon=0.0)]
    ask(make(ledger, plans), ledger, 1)
    ask(make(ledger, plans), ledger, 2)  # and here the driver died
    repeats, differs = make(ledger, plans), make(ledger, plans)
    repeats.begin_again(2, {}, same_noise=True)
    assert repeats.cohort(2) == ([0, 1], {})
    differs.begin_again(2, {}, same_noise=False)
    cohort, retiring = differs.cohort(2)
    assert (cohort, list(retiring)) == ([1], [0])  # a third release would be beyond what client 0 may spend


def test_rounds_that_are_done_again_do_not_use_up_a_client(ledger):
    plan = dataclasses.replace(PLAN, target_epsilon=0.0)
    ask(make(ledger, [plan], size=1), ledger, 1)
    roster = make(ledger, [plan], size=1, max_rounds_per_client=1)
    assert roster.cohort(2)[0] == []
    roster.begin_again(1, {}, same_noise=True)
    assert roster.cohort(1)[0] == [0]


def test_what_a_new_strategy_finds_in_the_ledger_counts(ledger):
    ask(make(ledger, [PLAN] * 2), ledger, 5)
    ask(make(ledger, [PLAN] * 2), ledger, 6)
    with pytest.raises(FederationOver):
        make(ledger, [PLAN] * 2).cohort(7)


def test_a_round_looks_only_at_the_clients_of_the_last_one(ledger, monkeypatch):
    plans = [dataclasses.replace(PLAN, target_epsilon=1.0 + client) for client in range(500)]
    roster, looked = make(ledger, plans, size=3), []
    monkeypatch.setattr(roster_module, "affordable", lambda history, plan, *_: looked.append(plan) or True)
    ask(roster, ledger, 1)
    assert len(looked) == 500
    for round in range(2, 6):
        looked.clear()
        ask(roster, ledger, round)
        assert len(looked) <= 3


def test_who_is_not_there_or_not_yet_joined_is_not_asked(ledger):
    plans = [dataclasses.replace(PLAN, target_epsilon=0.0, first_round=r) for r in (1, 1, 3)]
    roster = make(ledger, plans, size=3)
    roster.join([1, 2])
    assert roster.cohort(1)[0] == [1]
    roster.join([0, 2])
    assert roster.cohort(3)[0] == [0, 2]
    assert math.isinf(plans[0].budget)


def cohorts(draw):
    """How often each pair of six clients was asked together in three of six."""
    together = dict.fromkeys(combinations(range(6), 2), 0)
    for r in range(ROUNDS):
        for pair in combinations(draw(r), 2):
            together[pair] += 1
    return together


def is_uniform(together):
    """Each pair is in 4 of the 20 cohorts of three; p from the chi-square of the 15 counts.

    The counts of one round are not independent, so each pair is tested by itself.
    """
    return min(stats.binomtest(count, ROUNDS, 4 / 20).pvalue for count in together.values()) > 1e-4


def test_all_pairs_are_asked_equally_often():
    assert is_uniform(cohorts(lambda r: draw_cohort(0, r, range(6), 3)))


@pytest.mark.parametrize(
    "broken", [lambda r: (0, 1, 2), lambda r: [(0, 1, 2), (3, 4, 5)][r % 2], lambda r: sorted([r % 5, 5, (r + 1) % 5])]
)
def test_cohorts_that_are_not_uniform_are_noticed(broken):
    assert not is_uniform(cohorts(broken))


@pytest.mark.parametrize("size", [0, 1, 3, 9])
def test_a_cohort_has_distinct_eligible_clients_in_order(size):
    eligible = {3, 1, 4, 15, 9, 2, 6, 5, 35, 8}
    for r in range(20):
        cohort = draw_cohort(0, r, eligible, size)
        assert len(cohort) == size
        assert set(cohort) <= eligible
        assert cohort == sorted(set(cohort))
        assert all(type(client) is int for client in cohort)


@pytest.mark.parametrize("size", [3, 4, 100])
def test_all_are_asked_where_no_more_are_left(size):
    assert draw_cohort(0, 1, [7, 2, 5], size) == [2, 5, 7]


def test_nobody_is_left():
    assert draw_cohort(0, 1, [], 3) == []


def test_equal_arguments_draw_the_same_in_any_order():
    assert draw_cohort(5, 2, range(100), 10) == draw_cohort(5, 2, list(range(99, -1, -1)), 10)
    assert draw_cohort(5, 2, range(100), 10) == draw_cohort(5, 2, set(range(100)), 10)


def test_rounds_and_seeds_differ_and_do_not_move_global_generators():
    np.random.seed(0)
    before = np.random.get_state()[1]
    drawn = {tuple(draw_cohort(seed, r, range(1000), 10)) for seed in range(5) for r in range(20)}
    assert len(drawn) == 100
    assert (np.random.get_state()[1] == before).all()


def test_tossed_cohorts_are_coins_of_their_own():
    cohorts = [toss_cohort(0, r, range(10), 0.3) for r in range(3000)]
    joined = np.array([[client in cohort for client in range(10)] for cohort in cohorts], dtype=float)
    np.testing.assert_allclose(joined.mean(0), 0.3, atol=0.04)
    sizes = joined.sum(1)
    assert abs(sizes.var() - 10 * 0.3 * 0.7) < 0.3  # a fixed size has none
    assert abs(np.corrcoef(joined.T)[np.triu_indices(10, 1)]).max() < 0.1
    assert toss_cohort(0, 1, range(10), 1.0) == list(range(10))
