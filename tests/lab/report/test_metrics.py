"""Pages of runs whose metric is not accuracy: the names, the units, the direction and the figures that there are."""

from __future__ import annotations

import csv
import json
import re

import pytest

from fed_dpsat.errors import InputError
from fed_dpsat.lab.report.comparing import compare
from fed_dpsat.lab.report.comparing_figures import mean_curve
from fed_dpsat.lab.report.comparing_page import as_data, as_table, write_comparison
from fed_dpsat.lab.report.condensed import read_runs, write_runs
from fed_dpsat.lab.report.page import cards, write_report
from fed_dpsat.lab.report.training_figures import quality_curves
from fed_dpsat.lab.report.words import not_shown
from fed_dpsat.run.metric import metric_named
from fed_dpsat.run.numbers import in_unit
from fed_dpsat.run.reading import load_run
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

RMSE = (80.0, 62.0, 58.0, 54.25)


def figures(page):
    folder = "figures" if page.name == "report.html" else f"{page.stem}-figures"
    return {path.stem for path in (page.parent / folder).glob("*.png")}


def text_of(page):
    """What a reader sees, without style and markup."""
    found = re.sub(r"<style>.*?</style>|<metadata>.*?</metadata>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", found).split())


NUMBERS = """
import torch
from fed_dpsat.data.dataset import Dataset, Examples

def numbers():
    x = torch.linspace(-1, 1, 64).view(-1, 1)
    one = Examples(inputs=x, labels=100 + 50 * x[:, 0], mean=(0.0,), std=(1.0,))
    return Dataset(name="numbers", train=one, test=one, label_scale=((100.0, 50.0),))
"""


def test_what_a_run_writes_is_what_its_readers_read(tmp_path):
    (tmp_path / "made.py").write_text(NUMBERS)
    data, folder = f"{tmp_path}/made.py:numbers", tmp_path / "run"
    given = {"dataset": data, "task": "regression", "num_clients": 2, "num_rounds": 1, "evaluate_every": 2}
    simulate(RunConfig(**given, metric="mae", noise_multiplier=1.0, delta=1e-2), folder)
    run = load_run(folder)
    assert (run.task, run.metric) == ("regression", metric_named("mae", "regression"))
    assert (run.num_test, run.num_draws, set(run.others)) == (64, None, {"rmse", "r2"})
    assert cards(run)[0] == ("test MAE", in_unit(run.score, run.metric), "64 public test examples, lower is better")
    assert 0 < run.score < 100
    (folder / "summary.json").unlink()
    assert load_run(folder).metric == run.metric, "of the settings"


@pytest.mark.slow
def test_the_page_of_a_regression_has_its_metrics_and_no_figure_of_classes(made_up):
    page = write_report(made_up("run", "regression", "rmse", RMSE, mae=(60.0, 50.0, 45.0, 42.5), r2=(0, 0.2, 0.3, 0.4)))
    text = text_of(page)
    for words in (
        "test RMSE 54.25", "lower is better", "test MAE 42.50", "test R2 0.4000", "Test RMSE against round",
        "RMSE of the global model", "from 80.0 to 54.2", "Calibration, accuracy by class and by client",
    ):  # fmt: skip
        assert words in text, words
    assert "test accuracy" not in text
    assert "Brier score" not in text
    assert "nats" not in text, "a square of an error has no such unit"
    assert {"rmse-against-round", "rmse-against-epsilon", "loss-against-round"} <= figures(page)
    assert not {"reliability", "class-accuracy", "client-accuracy", "client-labels"} & figures(page)


def test_perplexity_over_decades_has_a_logarithmic_axis(made_up, tmp_path):
    run = load_run(made_up("run", "causal-lm", "perplexity", (260.0, 40.0, 12.0, 7.5), token_accuracy=(0.0, 0, 0, 0.3)))
    curve = next(quality_curves(run, tmp_path))
    ticks = {tick for tick in re.findall(r">([\d,]+)</text>", curve.svg) if float(tick) >= 5}
    assert ticks == {"10", "20", "50", "100", "200"}
    assert ">test perplexity (lower is better)<" in curve.svg
    assert curve.table.head[2:] == ("perplexity (lower is better)", "token accuracy", "loss (nats)")
    assert curve.table.rows[-1][2:] == ("7.500", "30.0 %", "1.00")
    narrow = load_run(made_up("narrow", "causal-lm", "perplexity", (9.0, 8.0, 7.75, 7.5)))
    assert {"2", "4", "6", "8"} <= set(re.findall(r">(\d)</text>", next(quality_curves(narrow, tmp_path)).svg)), (
        "linear"
    )


def test_a_metric_without_a_value_is_undefined_and_not_0(made_up, tmp_path):
    run = load_run(made_up("run", "classification", "auroc", ("undefined",) * 4, accuracy=(0.5, 1.0, 1.0, 1.0)))
    drawn = {drawing.name for drawing in quality_curves(run, tmp_path)}
    assert drawn == {"loss-against-round", "loss-against-epsilon"}
    assert "AUROC: it is undefined in all rounds on the public test split." in not_shown(run, drawn)
    assert cards(run)[0] == ("test AUROC", "undefined", "public test split")


def test_rounds_without_a_value_are_gaps(made_up, tmp_path):
    run = load_run(made_up("run", "multilabel", "auroc", ("undefined", None, 0.75, 0.8125)))
    assert [line["round"] for line in run.evaluated] == [0, 2, 3]
    curve = next(quality_curves(run, tmp_path))
    assert [row[2] for row in curve.table.rows] == ["undefined", "75.0 %", "81.2 %"]
    assert cards(run)[0] == ("test AUROC", "81.2 %", "public test split"), "without the interval of a share of examples"


def test_a_run_that_has_not_ended_shows_the_metric_of_its_settings(run_folder, made_up):
    folder = made_up("run", "regression", "rmse", RMSE)
    (folder / "summary.json").unlink()
    with pytest.raises(InputError, match=r"rounds.jsonl, line 1 is damaged \(not .*test_accuracy"):
        load_run(folder)  # its settings say classification


def test_the_smallest_error_is_first_and_on_the_front(made_up, tmp_path):
    paths = [
        made_up(f"{lr}-{seed}", "regression", "rmse", (80.0, 62.0, 58.0, last), seed=seed, lr=lr)
        for lr, lasts in ((8.0, (54.0, 56.0)), (4.0, (50.0, 52.0)))
        for seed, last in enumerate(lasts)
    ]
    found = write_comparison(paths, tmp_path / "compare.html")
    assert [group.score.mean for group in found.groups] == [51.0, 55.0]
    assert [group.on_front for group in found.groups] == [True, False]
    assert as_table(found).head[:6] == ("group", "n", "RMSE (lower is better)", "sd", "loss", "epsilon")
    text = text_of(tmp_path / "compare.html")
    for words in ("Groups, by increasing RMSE", "as little RMSE", "RMSE and loss are means", "lowest at the end: lr 4"):
        assert words in text, words
    assert "ccuracy" not in text
    assert "ECE" not in text
    assert "rmse-against-round" in figures(tmp_path / "compare.html")
    (first, _) = csv.DictReader((tmp_path / "compare.csv").open())
    assert (float(first["rmse_mean"]), "ece_mean" in first, "accuracy_mean" in first) == (51.0, False, False)
    data = as_data(found)
    assert (data["task"], data["metric"]["higher_is_better"], data["groups"][0]["rmse"]["n"]) == (
        "regression", False, 2,
    )  # fmt: skip
    write_runs([load_run(path) for path in paths], tmp_path / "runs.jsonl")
    again = compare(read_runs([tmp_path / "runs.jsonl"]))
    assert (again.task, again.metric) == ("regression", metric_named("rmse", "regression"))
    assert [group.score for group in again.groups] == [group.score for group in found.groups]
    assert len(mean_curve(again.groups[0], again.metric, "round")) == 4


def test_runs_of_different_metrics_are_refused(run_folder, made_up):
    other = made_up("other", "regression", "rmse", RMSE)
    words = "accuracy of classification in run; RMSE of regression in other and 1 more"
    with pytest.raises(InputError, match=words):
        compare([load_run(run_folder), load_run(other), load_run(other)])


def test_a_group_with_an_undefined_run_has_no_mean(made_up, tmp_path):
    defined = made_up("a", "multilabel", "auroc", (0.5, 0.6, 0.7, 0.8))
    undefined = made_up("b", "multilabel", "auroc", (0.5, 0.6, "undefined", "undefined"), lr=4.0)
    found = write_comparison([undefined, defined], tmp_path / "compare.html")
    assert [(group.label, group.score is None, group.on_front) for group in found.groups] == [
        ("lr 8", False, True), ("lr 4", True, False),
    ]  # fmt: skip
    assert "AUROC is undefined on the examples of a run in 1 of 2 groups." in found.notes
    assert as_table(found).rows[1][2] == "undefined"
    assert as_data(found)["groups"][1]["auroc"] == "undefined"
    json.dumps(as_data(found)["groups"][1]["auroc"], allow_nan=False)
    assert [row["auroc_mean"] for row in csv.DictReader((tmp_path / "compare.csv").open())] == ["80.0", "undefined"]
    only = write_comparison([undefined], tmp_path / "only.html")
    assert (only.groups[0].score, (tmp_path / "only-figures").exists()) == (None, False)
