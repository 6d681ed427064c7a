"""Epsilon against who sees models alone: of the rounds as they fell, and no figure where coins show in another way."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.accounting.released import Cohort, epsilon_of_models, epsilon_released
from fed_dpsat.flower.roster import toss_cohort
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import resume, simulate

pytestmark = pytest.mark.usefixtures("untried")  # the trial has tests of its own: tests/client/test_trial.py

CONFIG = RunConfig(
    **{"num_clients": 4, "clients_per_round": 1, "client_sampling": "poisson", "noise_multiplier": 2.0, "delta": 1e-4},
    **{"num_rounds": 12, "sample_rate": 1.0, "ascent_memory": "zero", "seed": 3, "evaluate_every": 12},
    validation_share=5 / 1437,  # which leaves 1432 = 4 * 358
)


def changed(**settings):
    return dataclasses.replace(CONFIG, **settings)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()][1:]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return simulate(CONFIG, folder), lines_of(folder)


def test_empty_rounds_are_seen_and_count_for_nothing(run):
    """The wrong version took all 12 rounds at the coin's own chance, and claimed 1.81."""
    summary, lines = run
    asked = [len(line["asked"]) for line in lines]
    assert 0 in asked
    assert {line["tossed"] for line in lines} == {4}
    assert [line["update_norm"] == 0 for line in lines] == [size == 0 for size in asked]  # to the bit
    (event,) = {plan.event for plan in make_plans(CONFIG)}
    ours = epsilon_of_models(event, [Cohort(size, 4) for size in asked], 0.25, 1e-4)
    assert summary["epsilon_released"] == ours
    not_empty = sum(size > 0 for size in asked)
    assert ours >= epsilon_released(event, {0.25 / (1 - 0.75**4): not_empty}, 1e-4)
    assert ours > epsilon_released(event, {0.25: 12}, 1e-4) == pytest.approx(1.81, abs=0.005)


def test_the_level_of_noise_tells_how_many_took_part(tmp_path):
    """Why cohorts are taken to be counted: the spread of a round's change, and nothing else, gives their sizes."""
    config = changed(num_rounds=20, clients_per_round=2, evaluate_every=20, sample_rate=0.1, seed=1)
    simulate(config, tmp_path / "run")
    lines = [line for line in lines_of(tmp_path / "run") if line["asked"]]
    of_one = config.lr * config.noise_multiplier * config.clip_norm / 35.8  # batches of a tenth of 1432 / 4 examples
    levels = np.sqrt(650) * of_one / np.sqrt(np.arange(1, 5))
    guesses = [1 + int(abs(levels - line["update_norm"]).argmin()) for line in lines]
    right = np.mean([guess == len(line["asked"]) for guess, line in zip(guesses, lines, strict=True)])
    assert right > 0.95  # the most frequent size alone would be right in 0.4


def test_who_tosses_before_others_join_is_known_to_take_part(tmp_path):
    (tmp_path / "table.csv").write_text("client,first_round\n1,9\n2,9\n3,9\n")
    config = changed(client_table=str(tmp_path / "table.csv"), clients_per_round=2)
    summary = simulate(config, tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert [line["tossed"] for line in lines] == [1] * 8 + [4] * 4
    (event,) = {plan.event for plan in make_plans(config)}
    cohorts = [Cohort(len(line["asked"]), line["tossed"]) for line in lines]
    assert summary["epsilon_released"] == epsilon_of_models(event, cohorts, 0.5, 1e-4)
    alone = sum(bool(line["asked"]) for line in lines[:8])
    assert alone  # who tosses alone is in each round that is not empty
    assert summary["epsilon_released"] > epsilon_released(event, {1.0: alone}, 1e-4)


@pytest.mark.by_default("settings0-*", "settings3-*", "settings4-*", "settings9-*")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"momentum": 0.5}, r"clients keep state between rounds \(momentum\)"),
        ({"ascent_memory": "client"}, r"clients keep state between rounds \(ascent"),
        ({"partition": "size-skew"}, "clients differ in size"),
        ({"validation_share": 4 / 1437}, "clients differ in size"),  # 359, 358, 358, 358
        ({"max_rounds_per_client": 2}, "max_rounds_per_client, the eligible clients depend on earlier coins"),
        ({"budget_mode": "retire", "target_epsilon": 2.2}, "budgets can end before the last round"),
        ({"secure_aggregation": True, "clients_per_round": 3}, "a round of too few clients"),
        ({"strategy": "trimmed"}, "uses more than the mean of replies"),
        ({"attack": "sign-flip", "attackers": 0.25}, "attackers compute"),
        ({"dropout_rate": 0.3}, "the public seed draws"),
        ({"delay": "exponential", "client_timeout": 2.0}, "the public seed draws"),
    ],
)
def test_where_coins_show_in_another_way_there_is_no_figure(tmp_path, settings, reason):
    summary = simulate(dataclasses.replace(changed(num_rounds=3), **settings), tmp_path / "run")
    assert summary["epsilon_released"] is None
    assert "epsilon_released_assumptions" not in summary
    assert re.search(reason, summary["epsilon_released_missing"])


def test_clients_with_noise_of_their_own_are_known_by_it(tmp_path):
    (tmp_path / "table.csv").write_text("client,sample_rate\n1,0.5\n")
    summary = simulate(changed(num_rounds=1, client_table=str(tmp_path / "table.csv")), tmp_path / "run")
    assert "clients differ in size, noise or sample rate" in summary["epsilon_released_missing"]


@pytest.mark.parametrize(
    "settings",
    [
        {"budget_mode": "retire", "target_epsilon": 50.0},  # enough for every round: nobody can retire
        {"noise_multiplier": 0.0, "target_epsilon": 5.0},  # calibrated to all rounds
        {"delay": "exponential"},  # late, and waited for
        {"strategy": "flwr.serverapp.strategy:FedAvgM"},
    ],
)
def test_what_cannot_bind_or_show_leaves_the_figure(tmp_path, settings):
    summary = simulate(dataclasses.replace(changed(num_rounds=3), **settings), tmp_path / "run")
    assert summary["epsilon_released"] > 0


def test_other_runs_have_no_such_figure(tmp_path):
    for number, settings in enumerate(({"client_sampling": "fixed"}, {"privacy_unit": "client"})):
        summary = simulate(dataclasses.replace(changed(num_rounds=1), **settings), tmp_path / str(number))
        assert not {"epsilon_released", "epsilon_released_missing"} & summary.keys()


@pytest.mark.parametrize("unit", ["example", "client"])
def test_with_noise_of_the_system_the_seed_does_not_tell_the_coins(tmp_path, unit):
    """The seed is in config.toml and with every client: coins that follow from it amplify nothing."""
    config = changed(noise_source="system", privacy_unit=unit, clients_per_round=2, num_rounds=6)
    simulate(config, tmp_path / "run")
    asked = [line["asked"] for line in lines_of(tmp_path / "run")]
    seeded = [toss_cohort(config.seed, round, range(4), 0.5) for round in range(1, 7)]
    assert asked != seeded  # by chance the same: 2 ** -24
    simulate(dataclasses.replace(config, noise_source="seeded"), tmp_path / "seeded")
    assert [line["asked"] for line in lines_of(tmp_path / "seeded")] == seeded


def stopped(config, folder, begun):
    """``config`` run until Ctrl-C after round 2, and perhaps into round 3: clients 0 to 3 are charged for it."""

    def stop(record):
        if record["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, folder, on_round=stop)
    if begun:
        with PrivacyLedger(folder / "ledger.sqlite") as ledger:
            ledger.charge_many(3, 0, dict(enumerate(plan.event for plan in make_plans(config))))
    return resume(folder)


def test_a_round_that_is_done_again_with_other_coins_ends_the_figure(tmp_path, run):
    system = changed(noise_source="system", num_rounds=4, clients_per_round=2)
    assert stopped(system, tmp_path / "between", begun=False)["epsilon_released"] > 0
    summary = stopped(system, tmp_path / "within", begun=True)
    assert "ran again with other coins" in summary["epsilon_released_missing"]
    lines = (tmp_path / "within" / "rounds.jsonl").read_text()
    again = resume(tmp_path / "within")  # at its end: nothing more is done, and what was is not forgotten
    assert "ran again with other coins" in again["epsilon_released_missing"]
    assert (tmp_path / "within" / "rounds.jsonl").read_text() == lines
    assert stopped(CONFIG, tmp_path / "seeded", begun=True)["epsilon_released"] == run[0]["epsilon_released"]
