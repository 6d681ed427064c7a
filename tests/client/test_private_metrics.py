"""What an example adds to an evaluation by clients, by brute force, and the metrics of exact and of noised totals."""

import itertools
import math

import numpy as np
import pytest
import torch

from fed_dpsat.client import private_metrics
from fed_dpsat.client.private_metrics import lines_of, metrics_of_totals, released_metrics, vectors_of
from fed_dpsat.client.totals import weights_of
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.tasks.classification import Classification
from fed_dpsat.tasks.regression import Regression

ALL = "confusion, scores, calibration"
CLASSES = 3
LOGITS = (-30.0, -1.0, 0.0, 2.0, 1e6, math.nan, math.inf)


def config(unit="example", **settings):
    given = {"evaluate": "clients", "holdout_share": 0.5, "evaluation_budget": 1.0, "target_epsilon": 8.0}
    return RunConfig(**{**given, "privacy_unit": unit, **settings})


def of_classes(unit="example"):
    task = Classification(tuple("abc"))
    outputs = torch.tensor(list(itertools.product(LOGITS, repeat=CLASSES))).repeat_interleave(CLASSES, 0)
    targets = torch.arange(CLASSES).repeat(len(outputs) // CLASSES)
    return vectors_of(config(unit, evaluation_metrics=ALL), task), outputs, targets


def of_numbers():
    task = Regression(2, ((5.0, 2.0), (0.0, 1.0)))
    values = torch.tensor(list(itertools.product(LOGITS, repeat=2)))
    targets = torch.tensor([[5.0, 0.0]]).repeat(len(values), 1)
    return vectors_of(config(task="regression", metric="mae", error_bound=3.0), task), values, targets


def largest(made):
    vectors, outputs, targets = made
    return {line: float(one.norm(dim=1).max()) for line, one in vectors(outputs, targets).items()}


MADE = {"classes": of_classes, "classes of clients": lambda: of_classes("client"), "numbers": of_numbers}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_one_example_adds_at_most_one_to_each_line_whatever_the_model_says(made):
    found = largest(made())
    assert set(found) >= {"loss"}
    for line, norm in found.items():
        assert norm == pytest.approx(1.0, abs=1e-12), line  # and some example adds as much: the bound is tight


def test_a_loss_that_is_not_clipped_exceeds_the_bound(monkeypatch):
    monkeypatch.setattr(private_metrics, "centred", lambda values, bound: (2 * values / bound - 1)[:, None])
    assert not largest(of_classes())["loss"] <= 1


def test_scores_without_their_scale_exceed_the_bound(monkeypatch):
    monkeypatch.setattr(private_metrics.math, "sqrt", lambda _: 1.0)
    assert largest(of_classes())["scores"] == pytest.approx(3**0.5)


def test_an_example_adds_the_same_in_any_batch():
    vectors, outputs, targets = of_classes()
    together, some = vectors(outputs, targets), slice(100, 103)
    for line, alone in vectors(outputs[some], targets[some]).items():
        assert torch.equal(together[line][some], alone)


@pytest.mark.parametrize("most", [1, 3])
def test_one_client_adds_at_most_one_to_each_line(most):
    vectors, outputs, targets = of_classes("client")
    one = config("client", statistics_examples=most)
    for size in (1, 2, 5):
        for line, rows in vectors(outputs[:1].repeat(size, 1), targets[:1].repeat(size)).items():
            weight = weights_of(np.array([float(size)]), one)[0]
            assert float(rows.sum(0).norm()) * weight <= 1 + 1e-12, line


def predictions(n=4000, classes=4):
    generator = np.random.default_rng(0)
    targets = torch.from_numpy(generator.integers(0, classes, n))
    outputs = torch.from_numpy(generator.normal(size=(n, classes))).float()
    outputs[torch.arange(n), targets] += 1.5
    return Classification(tuple("abcd")), outputs, targets


def test_metrics_of_exact_totals_are_the_exact_ones():
    task, outputs, targets = predictions()
    one = config(evaluation_metrics=ALL, loss_bound=50.0)
    totals = {line: rows.sum(0).numpy() for line, rows in vectors_of(one, task)(outputs, targets).items()}
    found = metrics_of_totals(totals, 0.0, one, task.outputs, len(targets))
    measure = task.measure()
    measure.update(outputs, targets)
    exact = measure.compute()
    assert list(found.values) == released_metrics(one)
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert found.values[name] == pytest.approx(exact[name], abs=1e-6)
    assert found.values["auroc"] == pytest.approx(exact["auroc"], abs=0.01)  # of 20 bins
    assert found.values["average_precision"] == pytest.approx(exact["average_precision"], abs=0.02)
    assert found.loss == pytest.approx(float(task.loss(outputs, targets).mean()), abs=1e-5)
    assert max(found.intervals.values()) == pytest.approx(0.0, abs=1e-12)
    assert 0 <= found.values["ece"] < 0.2


def test_intervals_hold_the_exact_value_as_often_as_they_say():
    task, outputs, targets = predictions()
    one = config(evaluation_metrics="confusion, scores")
    totals = {line: rows.sum(0).numpy() for line, rows in vectors_of(one, task)(outputs, targets).items()}
    exact = metrics_of_totals(totals, 0.0, one, task.outputs, len(targets))
    generator, held, noise, n = np.random.default_rng(1), dict.fromkeys(exact.values, 0), 40.0, 25
    for _ in range(n):
        noisy = {line: total + noise * generator.standard_normal(len(total)) for line, total in totals.items()}
        found = metrics_of_totals(noisy, noise, one, task.outputs, len(targets))
        for name, value in exact.values.items():
            held[name] += abs(found.values[name] - value) <= found.intervals[name]
    assert all(count >= 0.85 * n for count in held.values()), held


def test_lines_are_those_that_the_settings_name():
    assert lines_of(config()) == ["loss", "accuracy"]
    assert lines_of(config("client", evaluation_metrics=ALL))[2:] == ["confusion", "scores", "calibration", "count"]
    assert released_metrics(config(evaluation_metrics="scores", metric="auroc"))[0] == "auroc"
