"""A sweep's file: what it expands to, and every mistake told in words before anything runs."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from fed_dpsat.errors import InputError
from fed_dpsat.lab.sweep.reading import read_spec
from fed_dpsat.lab.sweep.spec import digest
from fed_dpsat.lab.sweep.tables import metric_of_sweep

ROOT = Path(__file__).parents[3]
BASE = 'base = { num_rounds = 2, target_epsilon = 2.0, delta = 1e-4, num_clients = 3, model = "linear" }\n'
METHODS = '[grid.method]\ndp-sgd = { optimizer = "dp-sgd" }\ndp-sat = { optimizer = "dp-sat" }\n'
TUNE = "[tune]\nseeds = [7, 8]\nlr = [1, 2]\n[tune.dp-sat]\nrho = [0, 0.1, 0.2]\n"


@pytest.fixture
def load(tmp_path):
    def load(text, overrides=(), only=()):
        path = tmp_path / "sweep.toml"
        path.write_text(text)
        return read_spec(path, overrides, only)

    return load


def test_cells_are_every_combination_and_each_runs_with_every_seed(load):
    spec = load(BASE + "[grid]\nlr = [1, 2.5]\nseed = [0, 3]\n" + METHODS)
    assert [cell.labels for cell in spec.cells()] == [
        {"lr": lr, "method": method} for lr in ("1", "2.5") for method in ("dp-sgd", "dp-sat")
    ]
    runs = [run for cell in spec.cells() for run in spec.final_runs(cell, {})]
    assert [(r.config.lr, r.config.optimizer, r.seed) for r in runs][:3] == [
        (1.0, "dp-sgd", 0),
        (1.0, "dp-sgd", 3),
        (1.0, "dp-sat", 0),
    ]
    assert len({run.folder_name for run in runs}) == len(runs) == 8
    assert not any(spec.tune_runs(cell) for cell in spec.cells())


def test_paths_are_relative_to_the_file_that_has_them(load, tmp_path):
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "mine.toml").write_text('noise_multiplier = 1.0\nmodel = "net.py:make"\ndata_path = "x"\n')
    start = '[grid]\nseed = [0]\nstart_from = ["a", "b"]\n[grid.method]\nm = { optimizer = "o.py:make" }\n'
    tune = '[tune]\nseeds = [7]\nclipping = ["c.py:make"]\n[tune.m]\nbase_optimizer = ["b.py:make+dp-sgd"]\n'
    spec = load('base = "bases/mine.toml"\n' + start + tune)
    (cell, _) = spec.cells()
    assert cell.labels == {"start_from": "a", "method": "m"}
    (run,) = spec.tune_runs(cell)
    found = run.config
    assert (found.model, found.data_path) == (f"{tmp_path}/bases/net.py:make", f"{tmp_path}/bases/x")
    assert (found.start_from, found.optimizer) == (f"{tmp_path}/a", f"{tmp_path}/o.py:make")
    assert (found.clipping, found.base_optimizer) == (f"{tmp_path}/c.py:make", f"{tmp_path}/b.py:make+dp-sgd")


def test_tuning_is_on_validation_examples_and_other_seeds_and_the_final_runs_are_not(load):
    spec = load(BASE + "[grid]\nseed = [0]\n" + METHODS + TUNE)
    sgd, sat = spec.cells()
    assert [dict(tuned) for tuned in sgd.candidates()] == [{"lr": 1}, {"lr": 2}]
    assert len(sat.candidates()) == 6
    tuning = spec.tune_runs(sat)
    assert len(tuning) == 12
    assert {run.config.validation_share for run in tuning} == {0.1}
    assert {run.seed for run in tuning} == {7, 8}
    (final,) = spec.final_runs(sat, {"lr": 2, "rho": 0.1})
    assert (final.config.validation_share, final.config.lr, final.config.rho, final.seed) == (0.0, 2.0, 0.1, 0)


def test_a_list_of_a_bundle_wins_over_the_one_for_all(load):
    spec = load(BASE + "[grid]\nseed = [0]\n" + METHODS + TUNE + "lr = [9]\n")
    assert [list(cell.tune["lr"]) for cell in spec.cells()] == [[1, 2], [9]]


def test_only_a_part_of_an_axis(load):
    text = BASE + "[grid]\nlr = [1, 2.5]\nseed = [0]\n" + METHODS
    assert [cell.key for cell in load(text, only=["lr=2.5", "method=dp-sat,dp-sgd"]).cells()] == [
        ("2.5", "dp-sgd"),
        ("2.5", "dp-sat"),
    ]
    for choice, words in (
        ("method", "of the form AXIS=LABEL"),
        ("methods=dp-sgd", "did you mean method"),
        ("method=dp-sta", "did you mean dp-sat"),
    ):
        with pytest.raises(InputError, match=words):
            load(text, only=[choice])


def test_base_may_be_a_file_beside_it_and_set_wins(load, tmp_path):
    (tmp_path / "base.toml").write_text('optimizer = "dp-sgd"\ntarget_epsilon = 1.0\nworkers = 2\n')
    spec = load('base = "base.toml"\n[grid]\nseed = [0]\n', ["target_epsilon=4"])
    (run,) = spec.final_runs(spec.cells()[0], {})
    assert (run.config.optimizer, run.config.target_epsilon, run.config.workers) == ("dp-sgd", 4.0, 0)


def test_a_run_has_one_digest_wherever_it_runs_and_whatever_else_is_in_the_sweep(load):
    def digests(text):
        spec = load(text)
        return {digest(run.config) for cell in spec.cells() for run in spec.final_runs(cell, {})}

    few = digests(BASE + "[grid]\nlr = [1, 2]\nseed = [0]\n")
    assert few < digests(BASE + "[grid]\nlr = [1, 2]\nseed = [0, 1]\n")
    assert few == digests(BASE.replace("num_rounds", 'cache_dir = "/elsewhere", num_rounds') + "[grid]\nlr = [1, 2]\n")
    assert not few & digests(BASE.replace("2.0", "2.5") + "[grid]\nlr = [1, 2]\n")


def test_fewer_rounds_are_another_run(load):
    spec = dataclasses.replace(
        load(BASE.replace("num_rounds = 2", "num_rounds = 10") + "[grid]\nseed = [0]\n"), rounds_share=0.39
    )
    assert spec.final_runs(spec.cells()[0], {})[0].config.num_rounds == 3


GRID = "[grid]\nseed = [0]\n"
ALL = BASE + GRID + METHODS + TUNE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE, "[grid] is empty"),
        (BASE + "[grid]\n", "[grid] is empty"),
        (BASE + "[grid]\nlr = []\n", "grid.lr is empty"),
        (BASE + "[grid]\nseed = []\n", "grid.seed is empty"),
        (BASE + "[grid]\nmethod = {}\n", "grid.method is empty"),
        (BASE + "[grid]\nlr = 1.0\n", "grid.lr is 1.0, not a list"),
        (BASE + "[grid]\nseed = [-1]\n", "not all integers of at least 0"),
        (BASE + "[grid]\nepsilon = [1]\n", "grid: 'epsilon' is not a setting; did you mean target_epsilon"),
        (BASE + "[grid.accuracy]\na = { lr = 1 }\n", "'accuracy' is a column of the tables"),
        (BASE + "[grid.auroc]\na = { lr = 1 }\n", "'auroc' is a column of the tables"),
        (BASE + "[grid]\nmetric = ['accuracy', 'auroc']\n", "grid sets metric; set it in the base, because a"),
        (BASE + "[grid.on]\na = { task = 'regression' }\n", "grid.on.a sets task; set it in the base"),
        (BASE + "[grid]\nlrr = [1]\n", "grid: 'lrr' is not a setting; did you mean lr"),
        (BASE + "[grid]\nmethods = ['dp-sgd']\n", "an axis of named bundles is a table, [grid.NAME]"),
        (BASE + "[grid.method]\na = { optimiser = 'dp-sgd' }\n", "grid.method.a: 'optimiser' is not a setting"),
        (BASE + "[grid.method]\na = 'dp-sgd'\n", "grid.method.a is 'dp-sgd', not a table"),
        (BASE + "[grid.optimizer]\na = { lr = 1 }\n", "optimizer is a setting; give the axis another name"),
        (BASE + "[grid]\nworkers = [1, 2]\n", "sets workers; use --workers"),
        (BASE + '[grid]\ndevice = ["cpu", "cuda"]\n', "sets device; set it in the base"),
        (BASE + "[grid]\nvalidation_share = [0.1]\n", "set it in [tune]"),
        (BASE + "[grid]\nlr = [1, 1.0]\n", "has a value twice"),
        (BASE + "[grid]\nlr = [1, -1]\n", "lr=-1 is not at least 0"),
        (BASE + "[grid]\nlr = [1]\n[grid.method]\na = { lr = 2 }\n", "lr is set by grid.lr and by grid.method"),
        (BASE + "[grid.method]\na = {}\nb = { optimizer = 'dp-sat' }\n", "are the same run; remove one"),
        (ALL.replace("[tune.dp-sat]", "[tune.dp-sta]"), "'dp-sta' is not a bundle or value of the grid; did you"),
        (BASE + GRID + METHODS + TUNE.replace("rho", "roh"), "tune.dp-sat: 'roh' is not a setting; did you mean rho"),
        (BASE + GRID + METHODS + TUNE.replace("[7, 8]", "[7, 0]"), "seed 0 is in grid.seed and in tune.seeds"),
        (BASE + GRID + METHODS + TUNE.replace("[1, 2]", "[]"), "tune.lr is empty"),
        (BASE + GRID + METHODS + TUNE.replace("seeds = [7, 8]", ""), "[tune] has no seeds"),
        (ALL.replace("lr = [1, 2]", "validation_share = 1.5"), "tune.validation_share=1.5 is not in (0, 1)"),
        (ALL.replace("lr = [1, 2]", "optimizer = ['dp-sgd']"), "optimizer is tuned, and set by grid.method"),
        (BASE + GRID + "[tune]\nseeds = [7]\n", "names nothing to search"),
        (BASE + GRID + "[tune]\nseeds = [7]\nseed = [1]\n", "seed is not tuned"),
        ("base = 3\n" + GRID, "base is 3"),
        ("base = 'nowhere.toml'\n" + GRID, "nowhere.toml"),
        ("base = { lrr = 1 }\n" + GRID, "base: 'lrr' is not a setting; did you mean lr"),
        ("base = { validation_share = 0.1 }\n" + GRID, "set it in [tune]"),
        ("base = {}\n" + GRID, "set one of the two above 0"),
        ("grids = 1\n" + GRID, "'grids' is not a table; did you mean grid"),
        ("base = \n", "valid TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_words(load, text, words):
    with pytest.raises(InputError, match=re.escape(words)):
        load(text)


def test_the_example_of_the_documentation_is_valid(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), flags=re.DOTALL)
    shutil.copy(ROOT / "simulations" / "digits_dpsat.toml", tmp_path)
    (tmp_path / "sweep.toml").write_text(example)
    spec = read_spec(tmp_path / "sweep.toml")
    assert [len(spec.tune_runs(cell)) for cell in spec.cells()] == [6, 18] * 3


def test_the_base_names_the_metric(load):
    of = 'task = "regression", metric = "mae", num_rounds'
    assert metric_of_sweep(load(BASE + GRID), []).name == "accuracy"
    assert metric_of_sweep(load(BASE.replace("num_rounds", of) + GRID), []).name == "mae"
    assert metric_of_sweep(load(BASE + GRID, ["metric=auroc"]), []).label == "AUROC"
