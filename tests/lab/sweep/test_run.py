"""A sweep as a whole: tuned on validation examples, gone on with after a kill, failures retried and reported."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.client.build import Experiment
from fed_dpsat.data.digits import digits
from fed_dpsat.errors import InputError, RunError
from fed_dpsat.lab.sweep import run_sweep
from fed_dpsat.lab.sweep.budget import Cost
from fed_dpsat.lab.sweep.execute import Result
from fed_dpsat.lab.sweep.reading import read_spec
from fed_dpsat.run.metric import metric_named

SMALL = """
base = { num_rounds = 2, delta = 1e-4, num_clients = 2, sample_rate = 0.2, noise_multiplier = 1.0 }
[grid]
seed = [0, 1]
[grid.method]
dp-sgd = { optimizer = "dp-sgd" }
dp-sat = { optimizer = "dp-sat" }
[tune]
seeds = [7]
lr = [0.0, 4.0]
"""
VARIES = ("seconds", "seconds_mean")


def invoke(*args):
    return CliRunner().invoke(app, ["sweep", *(str(a) for a in args)])


def table(folder, name):
    return list(csv.DictReader((folder / f"{name}.csv").open()))


def settled(folder):
    """Both tables without what depends on the machine."""
    return [
        [{k: v for k, v in row.items() if k not in VARIES} for row in table(folder, n)] for n in ("results", "summary")
    ]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def whole(file):
    out = file.parent / "whole"
    assert not run_sweep(file, out).failed
    return out


@pytest.mark.slow
def test_the_better_candidate_runs_on_the_test_split(whole):
    results = table(whole, "results")
    assert [(r["stage"], r["method"], r["lr"], r["seed"], r["split"]) for r in results] == [
        *(("tune", method, lr, "7", "validation") for method in ("dp-sgd", "dp-sat") for lr in ("0.0", "4.0")),
        *(("final", method, "4.0", seed, "test") for method in ("dp-sgd", "dp-sat") for seed in ("0", "1")),
    ]
    assert all(r["status"] == "completed" and float(r["epsilon"]) > 0 for r in results)
    assert pq.read_table(whole / "results.parquet").num_rows == len(results)
    said = json.loads((whole / "sweep.json").read_text())
    assert "epsilon does not cover that" in said["privacy"]
    assert said["chosen"] == [{"method": method, "lr": 4.0} for method in ("dp-sgd", "dp-sat")]
    (row,) = [r for r in table(whole, "summary") if r["stage"] == "final" and r["method"] == "dp-sat"]
    accuracies = [float(r["accuracy"]) for r in results if r["stage"] == "final" and r["method"] == "dp-sat"]
    assert (row["n"], row["failed"], row["chosen"]) == ("2", "0", "True")
    assert float(row["accuracy_mean"]) == pytest.approx(sum(accuracies) / 2)
    assert float(row["accuracy_sd"]) == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)


def test_in_a_tuning_run_the_test_split_is_not_there(file):
    spec = read_spec(file)
    (cell, _), test = spec.cells(), digits().test
    tuning, final = (
        Experiment.build(runs[0].config).dataset for runs in (spec.tune_runs(cell), spec.final_runs(cell, {}))
    )
    assert (len(tuning.train), len(tuning.test)) == (1437 - 144, 144)
    assert not {row.tobytes() for row in tuning.test.inputs.numpy()} & {row.tobytes() for row in test.inputs.numpy()}
    assert torch.equal(final.test.inputs, test.inputs)


def test_what_is_complete_is_not_run_again(file, whole, monkeypatch):
    before = (whole / "results.csv").read_bytes()
    monkeypatch.setattr("fed_dpsat.lab.sweep.run.execute", None)
    assert not run_sweep(file, whole).failed
    assert (whole / "results.csv").read_bytes() == before


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_table_and_no_two_work_in_one_folder(file, whole, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "fed_dpsat.cli", "sweep", str(file), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(out.glob("runs/*/summary.json"))) < 3:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # at work, and it stays so while another one is tried
    with pytest.raises(InputError, match="another sweep is active there"):
        run_sweep(file, out)
    process.kill()
    process.communicate()
    assert len(list(out.glob("runs/*/summary.json"))) < 8, "it was killed too late to mean anything"
    assert not run_sweep(file, out).failed
    assert settled(out) == settled(whole)


def test_a_run_that_was_interrupted_is_resumed(file, whole, tmp_path):
    """Of one run, the summary is taken away and the last round undone by hand, as a kill would."""
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    (folder,) = out.glob("runs/final-dp-sat-*seed=1-*[0-9a-f]")
    (folder / "summary.json").unlink()
    before = (folder / "ledger.sqlite").stat().st_ino
    assert not run_sweep(file, out).failed
    assert (folder / "ledger.sqlite").stat().st_ino == before
    assert settled(out) == settled(whole)


BROKEN = """
from pathlib import Path
import torch
from torch import nn

class Broken(nn.Module):
    '''Fails in training as often as the file beside this one says.'''
    def __init__(self, num_classes):
        super().__init__()
        self.linear = nn.Linear(64, num_classes)
    def forward(self, x):
        left = Path(__file__).with_suffix(".left")
        if self.training and torch.is_grad_enabled() and (count := int(left.read_text())):
            left.write_text(str(count - 1))
            raise RuntimeError("broken layer")
        return self.linear(x.flatten(1))
"""


@pytest.mark.parametrize(("failures", "code"), [(2, 0), (1000, 1)])  # the second: vmap fails, and so does the loop
def test_a_failure_is_shown_tried_once_more_and_then_reported(tmp_path, untried, failures, code):
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "broken.left").write_text(str(failures))
    file = tmp_path / "sweep.toml"
    file.write_text(
        "base = { num_rounds = 1, delta = 1e-4, num_clients = 1, noise_multiplier = 1.0, engine = 'vmap' }\n"
        f"[grid]\nmodel = ['linear', '{tmp_path}/broken.py:Broken']\nseed = [3]\n"
    )
    result = invoke(file, "--out", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert "failed, runs again" in result.stderr
    assert "broken layer" in result.stderr
    assert "Traceback" not in result.output
    sound, broken = table(tmp_path / "out", "results")
    assert sound["status"] == "completed"
    assert (broken["status"], "broken layer" in broken["error"]) == (("failed", True) if code else ("completed", False))
    assert [row["failed"] for row in table(tmp_path / "out", "summary")] == ["0", str(code)]
    assert len(list((tmp_path / "out" / "runs").glob("*.failed-1"))) == 1


def test_a_table_is_of_one_version_of_a_plugin(tmp_path, untried):
    """A complete run of another version is refused; one that failed is begun anew, with what was mended."""
    (tmp_path / "plugin.py").write_text(BROKEN)
    (tmp_path / "plugin.left").write_text("1000")
    file, model = tmp_path / "sweep.toml", f"{tmp_path}/plugin.py:Broken"
    base = "base = { num_rounds = 1, delta = 1e-4, num_clients = 1, noise_multiplier = 1.0, engine = 'vmap' }\n"
    file.write_text(f"{base}[grid]\nmodel = ['{model}']\nseed = [3]\n")
    assert invoke(file, "--out", tmp_path / "out").exit_code == 1
    (tmp_path / "plugin.py").write_text(BROKEN.replace("left.read_text()", "0"))
    mended = invoke(file, "--out", tmp_path / "out")
    assert (mended.exit_code, table(tmp_path / "out", "results")[0]["status"]) == (0, "completed"), mended.output
    assert invoke(file, "--out", tmp_path / "out").exit_code == 0
    (tmp_path / "plugin.py").write_text(BROKEN.replace("left.read_text()", "0") + "\n")
    file.write_text(f"{base}[grid]\nmodel = ['{model}']\nseed = [3, 4]\n")
    refused = invoke(file, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "plugin.py (model) has changed since" in " ".join(refused.stderr.split())
    assert len(table(tmp_path / "out", "results")) == 1


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(SMALL[: SMALL.index("[tune]")].replace("[0, 1]", "[0]"))
    return path


def test_a_budget_is_kept_in_what_is_run_and_said(tiny, tmp_path, monkeypatch):
    costs = {(method,): Cost(fixed=0.0, rounds=60.0) for method in ("dp-sgd", "dp-sat")}
    monkeypatch.setattr("fed_dpsat.lab.sweep.run._Sweep._measure", lambda self: costs)
    swept = run_sweep(tiny, tmp_path / "out", budget=1.0)  # of the two minutes that two runs would take
    assert swept.left_out == ["50% of the rounds of every run"]
    assert [row["rounds"] for row in table(tmp_path / "out", "results")] == ["1", "1"]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["left_out"] == swept.left_out
    monkeypatch.setattr("fed_dpsat.lab.sweep.run._Sweep._measure", None)  # it is decided
    monkeypatch.setattr("fed_dpsat.lab.sweep.run.execute", None)
    assert run_sweep(tiny, tmp_path / "out", budget=1.0).left_out == swept.left_out


def test_measured_costs_are_those_of_a_run_of_each_kind(tiny, tmp_path):
    assert run_sweep(tiny, tmp_path / "out", budget=600.0).left_out == []
    plan = json.loads((tmp_path / "out" / "sweep.json").read_text())["plan"]
    assert [cost["kind"] for cost in plan["costs"]] == ["dp-sgd", "dp-sat"]
    assert all(cost["rounds"] > 0 for cost in plan["costs"])
    assert plan["estimated_minutes"] == plan["estimated_minutes_of_all"] > 0


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        (SMALL.replace("[7]", "[]"), [], "tune.seeds is empty"),
        (SMALL.replace('"dp-sat" }', '"dp-sta" }'), [], "did you mean dp-sat"),
        (SMALL, ["--budget", "0"], "--budget=0.0 is not in (0, inf) minutes"),
        (SMALL, ["--workers", "-1"], "workers=-1 is not at least 0"),
        (SMALL, ["--workers", "2", "--set", "device=cuda"], "Ray would give them none"),
        (SMALL, ["--workers", "2", "--set", "device=auto"], "device='auto' is not possible with --workers"),
        (SMALL, ["--set", "device=cuda", "--set", "gpus_per_worker=0.5"], "not possible with workers=0"),
        (SMALL, ["--set", "lrr=1"], "lrr"),
    ],
)
def test_bad_input_is_one_line_and_runs_nothing(tmp_path, text, arguments, words):
    (tmp_path / "sweep.toml").write_text(text)
    result = invoke(tmp_path / "sweep.toml", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "runs").exists()


def test_a_folder_of_a_run_is_refused(file, tmp_path):
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(InputError, match="a folder of a sweep, or new"):
        run_sweep(file, tmp_path)


def test_json_has_the_summary(file, whole):
    result = invoke(file, "--out", whole, "--json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert [row["n"] for row in said["summary"] if row["stage"] == "final"] == [2, 2]
    assert (said["failed"], said["left_out"]) == ([], [])
    shown = invoke(file, "--out", whole).output
    assert "epsilon does not cover that" in shown.replace("\n", " ")
    assert "dp-sat" in shown


@pytest.mark.slow
def test_workers_give_the_same_table(file, whole, tmp_path):
    """In a process of its own: a Ray of two CPUs is started and ended."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fed_dpsat.cli", "sweep", str(file), "--out", str(out), "--workers", "2", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert settled(out) == settled(whole)


@pytest.mark.slow
def test_killed_with_workers_it_goes_on_to_the_same_table(file, whole, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "fed_dpsat.cli", "sweep", str(file), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("runs/*/rounds.jsonl"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert settled(out) == settled(whole)


@pytest.fixture
def measured(monkeypatch):
    """Runs without training: ``measured(task, metric, {lr: value})`` is what each run with this lr reports."""

    def of(task, metric, values):
        def execute(attempt):
            value = values[attempt.run.config.lr]
            stated = {"task": task, "metric": dataclasses.asdict(metric_named(metric, task))}
            more = {"epsilon": 1.0, "noise_multiplier": 1.0, "rounds_completed": 2, "seconds": 1.0}
            summary = {"status": "completed", **stated, f"test_{metric}": value, "test_loss": 1.0, **more}
            return Result(summary=summary, wall_seconds=1.0)

        monkeypatch.setattr("fed_dpsat.lab.sweep.run.execute", execute)

    return of


THREE = SMALL.replace("lr = [0.0, 4.0]", "lr = [1.0, 2.0, 4.0]")


@pytest.mark.parametrize(
    ("task", "metric", "values", "chosen"),
    [
        ("regression", "rmse", {1.0: 80.0, 2.0: 50.0, 4.0: 60.0}, 2.0),
        ("regression", "rmse", {1.0: 80.0, 2.0: "inf", 4.0: 90.0}, 1.0),
        ("regression", "rmse", {1.0: 80.0, 2.0: "undefined", 4.0: 60.0}, 4.0),
        ("regression", "r2", {1.0: -0.5, 2.0: 0.5, 4.0: 0.25}, 2.0),
        ("causal-lm", "perplexity", {1.0: 30.0, 2.0: 9.0, 4.0: 9.0}, 2.0),
    ],
)
def test_a_sweep_chooses_by_the_metric_and_its_direction(tmp_path, measured, task, metric, values, chosen):
    (tmp_path / "sweep.toml").write_text(THREE)
    measured(task, metric, values)
    swept = run_sweep(tmp_path / "sweep.toml", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["lr"] for row in said["chosen"]] == [chosen, chosen]
    assert (swept.metric.name, said["metric"]["name"]) == (metric, metric)
    (row, _) = [row for row in table(tmp_path / "out", "summary") if row["stage"] == "final"]
    assert float(row[f"{metric}_mean"]) == values[chosen]
    assert not any("accuracy" in name for name in row)
    second = next(row[metric] for row in table(tmp_path / "out", "results") if row["lr"] == "2.0")
    assert second == ("" if values[2.0] == "undefined" else str(values[2.0]))


def test_the_terminal_shows_the_metric_of_the_sweep(tmp_path, measured):
    (tmp_path / "sweep.toml").write_text(SMALL.replace("lr = [0.0, 4.0]", "lr = [4.0]"))
    measured("regression", "rmse", {4.0: 54.125})
    shown = " ".join(invoke(tmp_path / "sweep.toml", "--out", tmp_path / "out").output.split())
    assert "test RMSE (lower is better)" in shown
    assert "RMSE 54.12 1.0 s" in shown
    assert "accuracy" not in shown
    said = json.loads(invoke(tmp_path / "sweep.toml", "--out", tmp_path / "again", "--json").stdout)
    assert (said["metric"]["label"], said["summary"][-1]["rmse_mean"]) == ("RMSE", 54.125)


def test_nothing_is_chosen_by_a_metric_without_a_value(tmp_path, measured):
    (tmp_path / "sweep.toml").write_text(THREE)
    measured("classification", "auroc", dict.fromkeys((1.0, 2.0, 4.0), "undefined"))
    with pytest.raises(RunError, match=r"dp-sgd: AUROC is undefined .* raise tune\.validation_share"):
        run_sweep(tmp_path / "sweep.toml", tmp_path / "out")
    (tmp_path / "sweep.toml").write_text(SMALL[: SMALL.index("[tune]")])
    measured("classification", "auroc", {2.0: "undefined"})
    shown = " ".join(invoke(tmp_path / "sweep.toml", "--out", tmp_path / "out").output.split())
    assert shown.count(" undefined ") >= 2
