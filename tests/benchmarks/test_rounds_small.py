"""The benchmark of small clients: equal models, a row per contestant, times by phase. Times are not tested."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess

import pytest
import torch

from benchmarks import rounds_small, rounds_small_profile, rounds_stacked_loop
from benchmarks.rounds_measure import Measured, Row
from benchmarks.rounds_small_run import run, small_config
from benchmarks.rounds_stacked_loop import stacked_loop
from fed_dpsat.step.noise import derive_generator, standard_normals

HERE, LIBRARY = "/somewhere/fed_dpsat/", "/somewhere/library.py"


@pytest.mark.by_default("1-linear", "4-mlp-small", "4-tanh-cnn-small")
@pytest.mark.parametrize("model", ["linear", "mlp-small", "tanh-cnn-small"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_stacked_loop_does_the_same_arithmetic_as_ours(model, steps):
    turns: list[None] = []
    config = small_config(clients=5, rounds=2, model=model, local_steps=steps, stack=5)
    a = run(config, lambda: turns.append(None))
    b = stacked_loop(dataclasses.replace(config, stack_clients=3), lambda: turns.append(None))
    assert len(turns) == 2 * (1 + 2)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=0)  # without the climb they differ by 2.5e-6


def test_the_stacked_loop_has_the_noise_of_each_client():
    words = rounds_stacked_loop._words(7, "noise", range(2, 5), 3, 2 * 5)
    for row, client in zip(words, range(2, 5), strict=True):
        wanted = derive_generator(7, purpose="noise", client=client, round=3)
        for step in row.reshape(2, 5):
            found = rounds_stacked_loop._normals(step[None])[0]
            torch.testing.assert_close(found[:9], standard_normals(wanted, 9), atol=0, rtol=0)


def test_rows_compare_in_the_same_turn():
    def measured(engine: str, times: list[float]) -> Measured:
        labels: Row = {"engine": engine, "clients": 10, "workers": 0}
        return Measured(labels=labels, times=times, cpu=[t / 2 for t in times], memory={})

    ours, loop, before = rounds_small._compared(
        [measured("ours", [2.0, 40.0, 2.0]), measured("loop", [1.0, 10.0, 2.0]), measured("before", [8.0, 80.0, 8.0])]
    )
    assert (ours["ratio_to_loop"], ours["speedup"], ours["clients_per_second"]) == (2.0, 4.0, 5)
    assert (ours["cpu_ratio_to_loop"], ours["cpu_speedup"]) == (2.0, 4.0)
    assert (loop["ratio_to_loop"], before["speedup"]) == (1.0, 1.0)
    (alone,) = rounds_small._compared([measured("ours", [2.0])])
    assert (alone["ratio_to_loop"], alone["speedup"]) == (None, None)


def test_an_earlier_build_is_the_one_of_its_folder(tmp_path):
    """A package in the folder stands for that build."""
    (tmp_path / "fed_dpsat").mkdir()
    (tmp_path / "fed_dpsat" / "__init__.py").write_text("raise SystemExit('the earlier one')")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "turns.py").write_text("Turn = turn_from_stdin = None")
    setting = rounds_small.Setting(clients=2, rounds=3, model="linear")
    earlier = rounds_small._earlier(str(tmp_path), setting)
    done = subprocess.run(earlier.command, env=dict(earlier.env), capture_output=True, text=True)
    assert "the earlier one" in done.stderr
    assert earlier.labels["stack"] == 1


def test_time_of_libraries_is_that_of_the_phases_that_call_them():
    judge, sums = ((f"{HERE}flower/{name}.py", 1, name) for name in ("judge", "sums"))
    outer, inner = ((LIBRARY, line, "call") for line in (1, 2))
    stats = {
        judge: (1, 1, 1.0, 4.0, {}),
        sums: (1, 1, 2.0, 3.0, {judge: (1, 1, 2.0, 3.0)}),
        outer: (2, 2, 0.5, 4.0, {judge: (1, 1, 0.5, 3.0), sums: (1, 1, 0.0, 1.0)}),
        inner: (9, 9, 8.0, 8.0, {outer: (1, 1, 8.0, 8.0), inner: (8, 8, 7.0, 7.0)}),
        (LIBRARY, 3, "of nobody"): (1, 1, 0.25, 0.25, {}),
    }
    found = rounds_small_profile.by_phase(stats)
    assert found["judge"] == pytest.approx(1 + 0.75 * 8.5)
    assert found["sums"] == pytest.approx(2 + 0.25 * 8.5)
    assert found["rest"] == 0.25
    assert sum(found.values()) == pytest.approx(11.75)


@pytest.mark.parametrize(
    ("path", "phase"),
    [
        (f"{HERE}flower/sums.py", "sums"),
        (f"{HERE}flower/round.py", "server messages"),
        (f"{HERE}flower/wire/codec.py", "records"),
        (f"{HERE}accounting/ledger.py", "ledger"),
        (f"{HERE}step/noise.py", "draws"),
        (f"{HERE}step/stacked.py", "arithmetic"),
        (f"{HERE}errors.py", "rest"),
        (LIBRARY, ""),
    ],
)
def test_phases_of_modules(path, phase):
    assert rounds_small_profile.phase_of(path) == phase


@pytest.mark.slow
def test_a_profile_adds_up():
    args = argparse.Namespace(small_models=["linear"], small_steps=[1], small_cohorts=[20], stack=[10], rounds=2)
    rows = rounds_small_profile.profiled(args)
    values = {row["phase"]: row["linear, 1, 20"] for row in rows}
    total, clock = values.pop("total"), values.pop("on the clock")
    assert clock > 0
    assert sum(values.values()) == pytest.approx(total, abs=len(values))
    assert values["rest"] <= 0.05 * total
