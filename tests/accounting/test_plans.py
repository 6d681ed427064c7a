"""Budgets: noise for each client's own schedule, or one noise and clients that stop in time."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fed_dpsat.accounting import PrivacyEvent, epsilon
from fed_dpsat.accounting.plans import BudgetError, affordable, make_plans, read_table, spend
from fed_dpsat.errors import InputError, SettingError
from fed_dpsat.settings.config import RunConfig

CONFIG = RunConfig(target_epsilon=2.0, delta=1e-4, num_rounds=5, local_steps=2, sample_rate=0.1, num_clients=4)
EVENT = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=1)


def with_table(tmp_path, text, **changes):
    path = tmp_path / "clients.csv"
    path.write_text(text)
    return dataclasses.replace(CONFIG, client_table=str(path), **changes)


def cost(plan, rounds):
    return epsilon([plan.event] * rounds, CONFIG.delta)


def test_noise_is_calibrated_to_the_whole_schedule():
    for plan in make_plans(CONFIG):
        assert 1.99 < cost(plan, 5) <= 2.0


def test_each_client_gets_noise_for_its_own_budget_rate_and_schedule(tmp_path):
    table = "client,target_epsilon,sample_rate,first_round\n1,1.0,,\n2,,0.4,\n3,,,4\n"
    plans = make_plans(with_table(tmp_path, table))
    assert [round(cost(plan, rounds), 1) for plan, rounds in zip(plans, (5, 5, 5, 2), strict=True)] == [2, 1, 2, 2]
    assert plans[2].event.sample_rate == 0.4
    noise = [plan.event.noise_multiplier for plan in plans]
    assert noise[1] > noise[0]
    assert noise[2] > noise[0]
    assert noise[3] < noise[0]
    assert plans[3].first_round == 4


def test_in_retire_mode_the_noise_is_everyones(tmp_path):
    config = with_table(tmp_path, "client,target_epsilon\n0,3\n", budget_mode="retire", noise_multiplier=2.0)
    plans = make_plans(config)
    assert {plan.event.noise_multiplier for plan in plans} == {2.0}
    assert [plan.budget for plan in plans] == [3, 2, 2, 2]


def test_without_a_target_there_is_no_budget():
    assert make_plans(RunConfig(noise_multiplier=1.0))[0].budget == math.inf


def test_a_budget_below_one_round_is_refused_with_its_cost():
    config = dataclasses.replace(CONFIG, budget_mode="retire", noise_multiplier=0.5)
    with pytest.raises(SettingError, match=r"target_epsilon=2.0 is not enough for one round of client 0, which costs"):
        make_plans(config)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("client,epsilon\n0,1\n", "columns are"),
        ("target_epsilon\n1\n", "columns are"),
        ("client,target_epsilon\n4,1\n", "line 2: client 4 occurs twice or is not in 0 to 3"),
        ("client,target_epsilon\n1,1\n1,2\n", "line 3: client 1 occurs twice"),
        ("client,target_epsilon\nx,1\n", "line 2: invalid literal"),
        ("client,target_epsilon\n0,-1\n", "line 2: target_epsilon must be in"),
        ("client,target_epsilon\n0,nan\n", "line 2: target_epsilon must be in"),
        ("client,sample_rate\n0,1.5\n", "sample_rate in"),
        ("client,first_round\n0,6\n", "first_round=6 is not in 1 to num_rounds=5"),
        ("client,first_round\n0\n", "not as many fields"),
    ],
)
def test_a_table_that_makes_no_sense_is_named_by_line(tmp_path, table, words):
    with pytest.raises(InputError, match=words):
        read_table(with_table(tmp_path, table))


def test_without_noise_budgets_in_a_table_have_no_effect(tmp_path):
    (tmp_path / "clients.csv").write_text("client,target_epsilon\n1,2.0\n")
    plans = make_plans(RunConfig(private=False, client_table=str(tmp_path / "clients.csv"), num_clients=2))
    assert [(plan.event.noise_multiplier, plan.budget) for plan in plans] == [(0.0, math.inf)] * 2


def test_a_missing_table_is_named():
    with pytest.raises(SettingError, match=r"client_table='nowhere\.csv'"):
        read_table(dataclasses.replace(CONFIG, client_table="nowhere.csv"))


def test_affordable_stops_before_the_budget_is_exceeded():
    plan = dataclasses.replace(make_plans(CONFIG)[0], event=EVENT, target_epsilon=3.0)
    history = []
    while affordable(history, plan, 1e-4, "pld"):
        history.append(EVENT)
    assert epsilon(history, 1e-4) <= 3.0 < epsilon([*history, EVENT], 1e-4)


def test_a_client_refuses_what_its_budget_does_not_allow():
    budget = epsilon([EVENT] * 3, 1e-4)
    history = ()
    for _ in range(3):
        history = spend(history, EVENT, budget, 1e-4, "pld")
    with pytest.raises(BudgetError, match="refused, nothing was computed"):
        spend(history, EVENT, budget, 1e-4, "pld")
    assert spend(history, EVENT, 0.0, 1e-4, "pld")  # 0 is no budget
