"""Who may be asked depends on ledger and plans alone, and costs what the cohort costs."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fed_dpsat.accounting import PrivacyEvent, epsilon
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import ClientPlan
from fed_dpsat.flower import roster as roster_module
from fed_dpsat.flower.nodes import FederationOver
from fed_dpsat.flower.roster import Roster

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
    roster.charged(cohort)
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
