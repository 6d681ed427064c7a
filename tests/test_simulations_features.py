"""The study of features: a finished run is a row at once, and is not run again; validation examples choose."""

from __future__ import annotations

import csv
import sys

import pytest

from simulations import features, features_figure
from simulations.dp_sat_figure import command_line

SEEN: list[dict] = []


class FakeRun(dict):
    """A run whose accuracy is its learning rate; the average is better than it on odd ones."""


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """One study with two candidates, and runs that take no time."""
    SEEN.clear()

    def simulate(config, out, progress):
        SEEN.append({"lr": config.lr, "seed": config.seed, "validation": config.validation_share})
        accuracy = config.lr / 100 + config.seed * 1e-6
        return FakeRun(
            test_accuracy=accuracy,
            averaged_test_accuracy=accuracy - 0.01,
            test_loss=1.0,
            epsilon=2.0,
            noise_multiplier=3.0,
        )

    study = features.Study(
        preset="fashion-mnist-1-client-epsilon-2", arms={"linear": [{"lr": 4.0}, {"lr": 8.0}]}, seeds=2
    )
    monkeypatch.setattr(features, "simulate", simulate)
    monkeypatch.setattr(features.gc, "collect", lambda: None)
    monkeypatch.setattr(features.logging, "disable", lambda level: None)  # it would last for the whole process
    monkeypatch.setattr(features, "studies", lambda: [study])
    monkeypatch.setattr(sys, "argv", ["features", "--data", str(tmp_path), "--out", str(tmp_path / "found.csv")])
    return tmp_path / "found.csv"


def test_settings_are_chosen_on_validation_examples_and_only_what_is_missing_runs_again(faked):
    features.main()
    assert [one["validation"] for one in SEEN] == [0.1, 0.1, 0, 0]
    assert [one["seed"] for one in SEEN] == [features.TUNED_ON, features.TUNED_ON, 0, 1]
    assert {one["lr"] for one in SEEN[2:]} == {8.0}
    rows = faked.read_text().splitlines(keepends=True)
    faked.write_text("".join(rows[:-1]))
    SEEN.clear()
    features.main()
    assert SEEN == [{"lr": 8.0, "seed": 1, "validation": 0}]
    assert faked.read_text().splitlines()[:-1] == "".join(rows).splitlines()[:-1]


@pytest.mark.slow
def test_the_figure_shows_what_is_finished(faked, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    features.main()
    monkeypatch.setattr(sys, "argv", ["figure", str(faked), str(tmp_path / "a.svg")])
    command_line("", features_figure.draw)
    said = capsys.readouterr().out
    assert "| fashion-mnist-1-client-epsilon-2 | linear | last | lr: 8.0 | 2 | 8.00 ± 0.00 | 0 |" in said
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_each_study_has_its_preset_and_equal_budgets():
    for study in features.studies():
        assert (features.HERE.parent / "presets" / f"{study.preset}.toml").is_file()
        assert len({len(candidates) for candidates in study.arms.values()}) == 1
    with (features.HERE.parent / "docs" / "results" / "features.csv").open(newline="") as file:
        assert next(csv.reader(file)) == list(features.FIELDS)
