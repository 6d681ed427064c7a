"""Comparisons of runs whose numbers a reader can compute."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.errors import InputError
from fed_dpsat.lab.report.comparing import compare, pareto
from fed_dpsat.lab.report.comparing_figures import apart, drawings, mean_curve, mean_text
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


def in_sweep(run, bundle, *settings):
    return dataclasses.replace(run, environment={"bundles": {"server": (bundle, settings)}})


def test_a_strategy_has_the_name_of_its_class_unless_two_classes_have_it():
    long = "flwr.serverapp.strategy:FedMedian"
    runs = [made(0.9, strategy="fedavg"), made(0.8, strategy=long)]
    assert [group.label for group in compare(runs).groups] == ["fedavg", "FedMedian"]
    other = made(0.7, strategy="my.own:FedMedian")
    assert [group.label for group in compare([*runs, other]).groups] == [
        "fedavg",
        f"dp-sat, strategy {long}",
        "dp-sat, strategy my.own:FedMedian",
    ]


def test_bundles_of_a_sweep_keep_their_names_in_place_of_their_settings():
    slow, fast = ("lr", "strategy", "strategy_args"), {"strategy": "FedAdam", "strategy_args": "eta=0.1"}
    runs = [in_sweep(made(0.9), "plain", *slow), in_sweep(made(0.8, lr=3.0, **fast), "adam", *slow)]
    assert [group.label for group in compare(runs).groups] == ["plain", "adam"]
    runs = [*runs, in_sweep(made(0.7, lr=3.0, noise_multiplier=4.0, **fast), "adam", *slow)]
    found = compare(runs).groups
    assert [group.label for group in found] == ["plain, noise_multiplier 2", "adam, noise_multiplier 2",
                                                "adam, noise_multiplier 4"]  # fmt: skip
    assert [group.family for group in found] == ["plain", "adam", "adam"]


def test_bundles_of_two_sweeps_with_one_name_are_told_apart_by_their_settings():
    runs = [in_sweep(made(0.9, lr=1.0), "mine", "lr"), in_sweep(made(0.8, lr=2.0), "mine", "lr")]
    assert [group.label for group in compare(runs).groups] == ["lr 1", "lr 2"]
    outside = [in_sweep(made(0.9, lr=1.0), "mine", "lr"), made(0.8, lr=2.0)]
    assert [group.label for group in compare(outside).groups] == ["mine", "lr 2"]


def test_the_bundle_of_a_run_is_read_from_its_sweep_and_kept_in_a_condensed_file(tmp_path, run_folder):
    for name in ("a", "b"):
        shutil.copytree(run_folder, tmp_path / "runs" / name)
    axes = {"server": {"plain": {}, "best": {"lr": 8.0}}, "rho": {"0.1": {"rho": 0.1}}}
    (tmp_path / "sweep.json").write_text(json.dumps({"asked": {"axes": axes}}))
    (tmp_path / "results.csv").write_text("server,rho,folder\nbest,0.1,runs/b\nplain,0.1,runs/a\n")
    runs = read_runs([tmp_path])
    assert [run.environment["bundles"] for run in runs] == [{"server": ("plain", ["lr"])}, {"server": ("best", ["lr"])}]
    write_runs(runs, tmp_path / "runs.jsonl")
    assert read_runs([tmp_path / "runs.jsonl"])[1].environment["bundles"] == {"server": ["best", ["lr"]]}
    (tmp_path / "results.csv").write_text("folder\nruns/a\n")
    with pytest.raises(InputError, match="tables are damaged"):
        read_runs([tmp_path])


def test_another_metric_of_the_task_ranks_the_groups(tmp_path, run_folder):
    write_runs([load_run(run_folder)], tmp_path / "runs.jsonl")
    for path in (run_folder, tmp_path / "runs.jsonl"):
        result = CliRunner().invoke(app, ["compare", str(path), "--metric", "macro_f1", "--json"])
        found, stated = json.loads(result.stdout), json.loads((run_folder / "quality.json").read_text())["metrics"]
        assert found["metric"]["label"] == "macro F1"
        assert found["groups"][0]["macro_f1"]["mean"] == pytest.approx(100 * stated["macro_f1"], rel=1e-4)
    wrong = CliRunner().invoke(app, ["compare", str(run_folder), "--metric", "macro-f1"])
    assert wrong.exit_code == 2
    assert "whose metrics are accuracy, balanced_accuracy, macro_f1" in wrong.stderr


def test_a_seed_that_is_there_twice_counts_once():
    found = compare([made(0.9), made(0.9), made(0.8, seed=1)])
    assert found.groups[0].score.n == 2
    assert "counted once" in " ".join(found.notes)


def test_runs_that_did_not_end_are_not_in_the_means():
    found = compare([made(0.9), made(0.1, seed=1, status="interrupted")])
    assert found.groups[0].score.mean == pytest.approx(90.0)
    assert "is interrupted and not in the means" in " ".join(found.notes)
    failed = [dataclasses.replace(made(0.1, seed=i, status="failed"), path=Path(f"run-{i}")) for i in range(1, 6)]
    notes = compare([made(0.9), *failed, made(0.1, seed=6, status="interrupted")]).notes
    assert "5 runs (run-1, run-2, run-3 and 2 more) are failed and not in the means." in notes, "one line, not five"
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
    assert "epsilon at delta 0.0001" in result.output
    assert "…" not in result.output, "no label is cut"
    assert "noise_multiplier 1" in result.output
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


def test_ticks_do_not_collide():
    assert apart([0.5, 1, 3, 8]) == [0.5, 1, 3, 8]
    assert apart([1, 1.1, 2, 2.1, 2.2, 7.9, 8]) == [1, 2, 8]
    assert apart([2.9, 3.0, 2.998, 30]) == [2.9, 30]


def test_epsilons_that_calibration_makes_equal_have_no_axis_of_their_own(tmp_path):
    runs = [made(0.9, epsilon=2.9999, lr=1.0), made(0.8, epsilon=2.9998, lr=2.0)]
    assert not any(drawing.name == "accuracy-and-epsilon" for drawing in drawings(compare(runs), tmp_path))


def test_rows_have_the_height_of_their_labels_and_shares_end_at_100_percent(tmp_path):
    long = {"data_path": "a-folder-with-a-long-name-of-its-own", "label_column": "another-long-name-it-is"}
    runs = [made(0.9 + 0.05 * seed, seed=seed, lr=float(lr), **long) for lr in range(1, 7) for seed in (0, 1)]
    runs += [made(0.1 * i, seed=i, lr=9.0) for i in (2, 9)]
    (rows,) = (drawing for drawing in drawings(compare(runs), tmp_path) if drawing.name == "groups")
    lines = re.findall(r'font-size: 8px[^>]*(?:translate\([\d.]+ |y=")([\d.]+)', rows.svg)
    tops = sorted(map(float, lines))
    assert len(tops) == 6 * 3 + 1
    assert min(below - above for above, below in pairwise(tops)) > 8, "no two lines of labels overlap"
    assert max(float(tick) for tick in re.findall(r">([\d.]+)</text>", rows.svg)) == 100


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
