"""The round benchmark measures what it says: the same arithmetic, and a row per contestant. Times are not tested."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from benchmarks import rounds
from benchmarks.rounds_contestants import Setting, loops, ours, ours_idle, ours_population, training_config
from benchmarks.rounds_loop import loop
from benchmarks.rounds_measure import Entry, Measured, Row, measure, table
from benchmarks.turns import Contestant, ContestantError

KEYS = {"engine", "clients", "model_mb", "workers", "seconds_per_round", "ms_per_client", "parent_mb", "growth_mb"}
ONE_TURN_A_LINE = "import benchmarks.turns as t; turn = t.turn_from_stdin(); print('noise'); [turn() for _ in range(9)]"


class Turns:
    """Counts."""

    taken = 0

    def __call__(self) -> None:
        self.taken += 1


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "rounds"), [("none", 2), ("private", 2), ("central", 1)])  # central has no bound
def test_the_bare_loop_does_the_same_arithmetic_as_ours(noise: str, rounds: int) -> None:
    turns = Turns()
    setting = Setting(clients=2, rounds=rounds, private=noise == "private", central=noise == "central")
    a, b = ours(setting, turns), loop(training_config(setting), turns)
    assert turns.taken == 2 * (1 + setting.rounds)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)


def test_the_loop_of_another_seed_is_another_model() -> None:
    config = training_config(Setting(clients=1, rounds=1))
    a, b = (loop(dataclasses.replace(config, seed=seed), Turns()) for seed in (0, 1))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) > 1e-3


def test_idle_clients_leave_the_model_as_it_is() -> None:
    turns = Turns()
    once = ours_idle(Setting(clients=3, rounds=1, model_mb=0.01), turns)
    twice = ours_idle(Setting(clients=3, rounds=2, model_mb=0.01), turns)
    assert turns.taken == 2 + 3
    assert sum(p.numel() * 4 for p in once.values()) == pytest.approx(0.01e6, rel=0.02)
    for name in once:
        torch.testing.assert_close(once[name], twice[name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_cohort_of_a_population_trains() -> None:
    turns = Turns()
    params = ours_population(Setting(clients=20, cohort=4, rounds=2), turns)
    assert turns.taken == 3
    assert sum(p.numel() for p in params.values()) == 170


def test_a_row_per_contestant_that_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    labels: Row = {"work": "idle", "engine": "good", "clients": 4, "model_mb": 1.0, "workers": 0}
    good = Entry(labels=labels, command=[sys.executable, "-c", ONE_TURN_A_LINE], rounds=2)
    bad = Entry(labels={**labels, "engine": "bad"}, command=[sys.executable, "-c", "raise OSError(7)"], rounds=2)
    (one,) = measure([good, bad], timeout=60)
    row = one.row()
    assert row["engine"] == "good"
    assert row.keys() >= KEYS
    assert row["rounds"] == 2
    assert "OSError: 7" in capsys.readouterr().err
    assert table([row]).splitlines()[0].startswith("| work | engine |")


def test_a_contestant_that_hangs_is_ended() -> None:
    with pytest.raises(ContestantError, match=r"timeout 0\.5 s"):
        Contestant([sys.executable, "-c", "import time; time.sleep(60)"], {}, timeout=0.5)


def test_ratios_are_of_the_same_turn() -> None:
    def measured(engine: str, workers: int, times: list[float], cpu: list[float]) -> Measured:
        labels: Row = {"engine": engine, "clients": 2, "workers": workers}
        return Measured(labels=labels, times=times, cpu=cpu, memory={})

    here, on_ray, bare, _ = rounds._with_ratios(
        [
            measured("ours", 0, [3.0, 30.0, 9.0], [2.2, 22.0, 5.5]),
            measured("ours", 1, [2.0, 20.0, 6.0], [0.1, 0.1, 0.1]),
            measured("loop", 0, [2.0, 20.0, 3.0], [2.0, 20.0, 5.0]),  # the machine was ten times slower in turn 2
            measured("pfl", 0, [4.0, 40.0, 12.0], [4.0, 44.0, 11.0]),
        ]
    )
    assert (here["ratio_to_loop"], here["ratio_to_pfl"], here["cpu_ratio_to_loop"]) == (1.5, 0.75, 1.1)
    assert (here["seconds_per_round"], here["parent_cpu_seconds"]) == (9.0, 9.9)
    assert "cpu_ratio_to_loop" not in on_ray
    assert bare["ratio_to_loop"] == 1.0


@pytest.mark.slow
def test_loops_share_the_clients() -> None:
    turns = Turns()
    loops(Setting(clients=2, rounds=1, workers=2), turns)
    assert turns.taken == 2
