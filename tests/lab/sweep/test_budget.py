"""What a budget leaves out, on costs whose sum a reader can compute."""

from __future__ import annotations

import dataclasses

import pytest

from fed_dpsat.errors import SettingError
from fed_dpsat.lab.sweep.budget import Cost, kind, minutes, shrink
from fed_dpsat.lab.sweep.spec import Spec

SPEC = Spec(
    base={"delta": 1e-4, "num_rounds": 100},
    axes={
        "target_epsilon": {"1": {"target_epsilon": 1.0}, "3": {"target_epsilon": 3.0}},
        "method": {"sgd": {"optimizer": "dp-sgd"}, "sat": {"optimizer": "dp-sat"}},
    },
    seeds=(0, 1, 2, 3, 4),
    tune={"lr": [1.0, 2.0]},
    tune_seeds=(10, 11),
    validation_share=0.1,
)
COSTS = {("sgd",): Cost(fixed=1.0, rounds=5.0), ("sat",): Cost(fixed=1.0, rounds=11.0)}


def test_all_of_it_is_runs_times_seconds():
    """Two epsilons, each 2 x 2 + 5 = 9 runs, of 6 and of 12 seconds: 324 seconds."""
    assert {kind(cell) for cell in SPEC.cells()} == set(COSTS)
    assert minutes(SPEC, COSTS, 0) == minutes(SPEC, COSTS, 1) == pytest.approx(5.4)
    assert minutes(SPEC, COSTS, 2) == pytest.approx(2.7)
    assert minutes(dataclasses.replace(SPEC, rounds_share=0.5), COSTS, 0) == pytest.approx(2 * 9 * (3.5 + 6.5) / 60)


@pytest.mark.parametrize(
    ("budget", "tune_seeds", "seeds", "rounds_share", "left_out"),
    [
        (5.4, (10, 11), (0, 1, 2, 3, 4), 1.0, []),
        (4.3, (10,), (0, 1, 2, 3, 4), 1.0, ["1 of 2 seeds of the tuning: 11"]),
        (3.7, (10,), (0, 1, 2, 3), 1.0, ["1 of 2 seeds of the tuning: 11", "1 of 5 seeds of the grid: 4"]),
        # five runs each, 10 x (1 + 1) seconds fixed and 10 x 16 of rounds: half of those are 100 seconds in all
        (
            100.001 / 60,
            (10,),
            (0, 1, 2),
            0.5,
            ["1 of 2 seeds of the tuning: 11", "2 of 5 seeds of the grid: 3, 4", "50% of the rounds of every run"],
        ),
    ],
)
def test_tuning_seeds_go_first_then_seeds_then_rounds(budget, tune_seeds, seeds, rounds_share, left_out):
    smaller, said = shrink(SPEC, COSTS, budget, 0)
    assert (smaller.tune_seeds, smaller.seeds, smaller.rounds_share) == (tune_seeds, seeds, rounds_share)
    assert said == left_out
    assert minutes(smaller, COSTS, 0) <= budget + 1e-9
    assert (smaller.axes, smaller.tune) == (SPEC.axes, SPEC.tune)


def test_a_budget_that_nothing_fits_says_what_would():
    with pytest.raises(SettingError, match=r"--budget=0.1 is not at least 0.6 minutes"):
        shrink(SPEC, COSTS, 0.1, 0)


def test_few_seeds_are_not_made_fewer():
    few = dataclasses.replace(SPEC, seeds=(0, 1), tune={}, tune_seeds=())
    smaller, said = shrink(few, COSTS, 0.4, 0)
    assert smaller.seeds == (0, 1)
    assert said == ["75% of the rounds of every run"]  # 8 runs: 8 seconds fixed, 64 of rounds, 24 asked for
