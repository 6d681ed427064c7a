"""Comparisons of runs whose numbers a reader can compute."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.errors import InputError
from fed_dpsat.lab.report.comparing import compare, pareto
from fed_dpsat.lab.report.comparing_figures import mean_curve, mean_text
from fed_dpsat.lab.report.comparing_page import as_csv, as_data, as_table, write_comparison
from fed_dpsat.lab.report.condensed import read_runs, write_runs
from fed_dpsat.run.metric import metric_of
from fed_dpsat.run.reading import load_run
from fed_dpsat.run.result import Run
from fed_dpsat.settings.config import RunConfig


def made(accuracy, *, seed=0, epsilon=3.0, status="completed", unit="one example", **settings):
    settings = {"noise_multiplier": 2.0, "delta": 1e-4, **settings}
    if not settings.get("private", True):
        settings["noise_multiplier"], epsilon = 0.0, math.inf
    config = RunConfig(seed=seed, **settings)
    rounds = tuple(
        {"round": r, "test_accuracy": a, "test_loss": round(1 - a, 4), "epsilon": r * epsilon if r else 0.0}
        for r, a in ((0, 0.1), (1, accuracy))
    )
    quality = {
        "round": 1, "measured_on": "public test split of digits", "num_examples": 360, "num_nonfinite": 0,
        "accuracy": accuracy, "nll": round(1 - accuracy, 4), "brier": 0.2, "ece": 0.1, "mce": 0.2,
    }  # fmt: skip
    summary = {"status": status, "privacy_unit": unit, "threat_model": "a server"}
    return Run(
        path=Path(f"{config.optimizer}-{epsilon}-{seed}"), config=config, environment={}, rounds=rounds, timing=(),
        summary=summary, quality=quality, simulation=None, sharpness=None, epsilon=epsilon, missing=(),
    )  # fmt: skip


def sweep():
    """DP-SAT 90, 92, 94 and DP-SGD 80, 80, 83 at epsilon 3, DP-SAT 95 at epsilon 8, and 97 without privacy."""
    runs = [made(a, seed=i, optimizer="dp-sat") for i, a in enumerate((0.90, 0.92, 0.94))]
    runs += [made(a, seed=i, optimizer="dp-sgd") for i, a in enumerate((0.80, 0.80, 0.83))]
    runs += [made(0.95, optimizer="dp-sat", noise_multiplier=1.0, epsilon=8.0)]
    return [*runs, made(0.97, optimizer="dp-sgd", private=False)]


def test_groups_are_what_differs_with_mean_interval_and_n():
    found = compare(sweep())
    assert found.differing == ("optimizer", "private", "noise_multiplier")
    assert [group.label for group in found.groups] == [
        "without privacy",
        "dp-sat, noise_multiplier 1",
        "dp-sat, noise_multiplier 2",
        "dp-sgd, noise_multiplier 2",
    ]
    sat = found.groups[2].score
    assert (sat.n, sat.mean, sat.sd) == (3, pytest.approx(92.0), pytest.approx(2.0))
    assert sat.half_width == pytest.approx(4.302653 * 2 / math.sqrt(3))
    assert found.groups[2].seeds == (0, 1, 2)
    assert mean_text(sat) == "92 ± 5"
    assert "2 of 4 groups have one seed" in " ".join(found.notes)


def test_workers_and_places_are_not_what_differs():
    found = compare([made(0.9, seed=0, workers=1), made(0.9, seed=1, out="there", evaluate_every=2)])
    assert (len(found.groups), found.differing, found.groups[0].label) == (1, (), "dp-sat")


def test_a_seed_that_is_there_twice_counts_once():
    found = compare([made(0.9), made(0.9), made(0.8, seed=1)])
    assert found.groups[0].score.n == 2
    assert "counted once" in " ".join(found.notes)


def test_runs_that_did_not_end_are_not_in_the_means():
    found = compare([made(0.9), made(0.1, seed=1, status="interrupted")])
    assert found.groups[0].score.mean == pytest.approx(90.0)
    assert "is interrupted and not in the means" in " ".join(found.notes)
    with pytest.raises(InputError, match="0 of 1 runs are complete"):
        compare([made(0.9, status="failed")])


@pytest.mark.parametrize(
    ("points", "on_front"),
    [
        ([(1, 80), (3, 90), (8, 95)], [True, True, True]),
        ([(1, 80), (3, 79), (8, 95)], [True, False, True]),
        ([(3, 90), (3, 92)], [False, True]),
        ([(3.0, 90), (2.999, 88)], [True, False]),  # calibrated to one budget: equal
        ([(3.0, 90), (2.9, 88)], [True, True]),
        ([(3, 90), (math.inf, 90)], [True, False]),
        ([(3, 90), (3, 90)], [True, True]),
    ],
)
def test_the_front_has_what_nothing_is_better_than(points, on_front):
    assert pareto(points) == on_front


def test_front_of_the_sweep():
    assert [group.on_front for group in compare(sweep()).groups] == [True, True, True, False]


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (made(0.5, delta=1e-2, optimizer="dp-sgd"), "delta (0.0001 / 0.01)"),
        (made(0.5, accountant="rdp", optimizer="dp-sgd"), "accountant (pld / rdp)"),
        (made(0.5, optimizer="dp-sgd", unit="a client"), "privacy unit (a client / one example)"),
    ],
)  # fmt: skip
def test_promises_that_differ_are_not_mixed(tmp_path, other, word):
    found = compare([made(0.9), other])
    assert not as_data(found)["comparable"]
    assert "not comparable" in found.notes[0]
    assert word in found.notes[0]
    assert [group.on_front for group in found.groups] == [True, True], "each is alone on the front of its kind"
    assert len(as_table(found).head) >= 9


def test_accuracies_of_other_examples_are_not_on_one_front():
    worse = made(0.5, validation_share=0.1)
    worse = dataclasses.replace(worse, quality={**worse.quality, "measured_on": "validation examples"})
    found = compare([made(0.9), worse])
    assert [group.on_front for group in found.groups] == [True, True]
    assert "different test examples" in found.notes[0]


def test_one_promise_is_comparable():
    assert as_data(compare(sweep()))["comparable"]


def test_curves_are_over_the_rounds_that_all_seeds_have():
    long = dataclasses.replace(made(0.8, seed=1), rounds=(*made(0.8).rounds, {**made(0.9).rounds[1], "round": 2}))
    group = compare([made(0.9), long]).groups[0]
    assert [at for at, _ in mean_curve(group, metric_of({}), "round")] == [0.0, 1.0]
    assert mean_curve(group, metric_of({}), "round")[1][1].mean == pytest.approx(85.0)
    assert [at for at, _ in mean_curve(group, metric_of({}), "epsilon")] == [0.0, 3.0]
    assert mean_curve(compare([made(0.9, private=False)]).groups[0], metric_of({}), "epsilon") == []


def test_rows_are_csv_and_json_too():
    found = compare(sweep())
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [row["group"] for row in rows] == [group.label for group in found.groups]
    assert float(rows[2]["accuracy_mean"]) == pytest.approx(92.0)
    assert rows[2]["seeds"] == "0 1 2"
    assert as_data(found)["groups"][2]["accuracy"]["n"] == 3


def test_condensed_runs_compare_as_they_did(tmp_path, run_folder):
    real = load_run(run_folder)
    write_runs([*sweep(), real], tmp_path / "runs.jsonl")
    back = read_runs([tmp_path / "runs.jsonl"])
    assert back[-1].config == dataclasses.replace(real.config, cache_dir=back[-1].config.cache_dir)
    assert back[-1].score == pytest.approx(real.score, rel=1e-4)
    text = as_csv(compare(back[:-1]))
    assert text == as_csv(compare(sweep()))
    assert "/" not in (tmp_path / "runs.jsonl").read_text().replace("1/", ""), "no path of a machine"


HEAD = '{"format": "fed_dpsat runs 1", "settings": {}}\n'


@pytest.mark.parametrize("text", ["", "{}\n", "{", HEAD.replace("runs 1", "runs 9"), HEAD + '{"name": 1}\n'])
def test_files_that_are_something_else_are_bad_input(tmp_path, text):
    (tmp_path / "runs.jsonl").write_text(text)
    with pytest.raises(InputError, match="runs"):
        read_runs([tmp_path / "runs.jsonl"])


def test_the_command_prints_a_table_and_writes_a_page(tmp_path):
    write_runs(sweep(), tmp_path / "runs.jsonl")

    def invoke(*arguments):
        return CliRunner().invoke(app, ["compare", *map(str, arguments)])

    result = invoke(tmp_path / "runs.jsonl", "--out", tmp_path / "page" / "compare.html")
    assert result.exit_code == 0, result.output
    assert "92 ± 5" in result.output
    page = (tmp_path / "page" / "compare.html").read_text()
    for words in ("Accuracy against epsilon", "n = 1 to 3 seeds", "delta = 0.0001", "Student's t", "360 examples"):
        assert words in page.replace("&#39;", "'")
    assert "http" not in page
    assert (tmp_path / "page" / "compare.csv").exists()
    assert (tmp_path / "page" / "compare-figures" / "accuracy-and-epsilon.png").exists()
    assert json.loads(invoke(tmp_path / "runs.jsonl", "--json").stdout)["groups"][0]["epsilon"] == "inf"
    wrong = invoke(tmp_path / "runs.jsonl", "--out", tmp_path / "x.pdf")
    assert (wrong.exit_code, invoke(tmp_path / "nothing").exit_code) == (2, 2)
    assert "is not one of" in wrong.stderr


@pytest.mark.slow
def test_many_groups_fit_on_a_page(tmp_path):
    runs = [
        made(0.5 + i / 200, optimizer="dp-sgd", lr=float(i + 1), rho=i / 7, clip_norm=1 + i / 10) for i in range(50)
    ]
    write_runs(runs, tmp_path / "runs.jsonl")
    found = write_comparison([tmp_path / "runs.jsonl"], tmp_path / "compare.html")
    assert len(found.groups) == 50
    assert "The best 7 of 50 groups" in (tmp_path / "compare.html").read_text()


def test_a_folder_of_runs_stands_for_them(tmp_path, run_folder):
    for name in ("runs/a", "runs/b.failed-1", "c"):
        shutil.copytree(run_folder, tmp_path / name)
    (tmp_path / "runs" / "a.log").touch()
    assert [run.name for run in read_runs([tmp_path])] == ["c", "a"]
    with pytest.raises(InputError, match="not a run folder"):
        read_runs([tmp_path / "runs" / "a.log"])
