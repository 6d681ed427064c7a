"""The metric that readers show: of the summary, of the settings, and of a version that knew only accuracy."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fed_dpsat.errors import InputError
from fed_dpsat.run.metric import (
    LOSS,
    loss_unit,
    metric_named,
    metric_of,
    metric_of_settings,
    metrics_of,
    number_of,
    other_metrics,
    task_of,
    value_of,
)
from fed_dpsat.tasks.metric import UNDEFINED, Metric

ACCURACY, RMSE, R2 = metric_of({}), metric_named("rmse", "regression"), metric_named("r2", "regression")


def test_a_summary_without_a_metric_is_of_a_classification():
    assert (task_of({}), metric_of({"test_accuracy": 0.9})) == ("classification", ACCURACY)


def test_the_summary_describes_a_metric_of_your_own():
    own = Metric(name="error", label="error of dose", higher_is_better=False, unit="mg")
    assert metric_of({"task": "mine:dose", "metric": dataclasses.asdict(own)}) == own
    assert own.heading == "error of dose (mg, lower is better)"


@pytest.mark.parametrize(
    "stated",
    ["rmse", {}, {"name": "rmse"}, {"name": "rmse", "label": "RMSE", "higher_is_better": "false", "unit": ""}],
)
def test_a_damaged_description_is_named(stated):
    with pytest.raises(InputError, match="of a summary is not name, label, higher_is_better, unit"):
        metric_of({"metric": stated})


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "accuracy"),
        ({"task": "regression"}, "rmse"),
        ({"task": "regression", "metric": "mae"}, "mae"),
        ({"task": "causal-lm", "metric": ""}, "perplexity"),
        ({"task": "mine:dose"}, "loss"),
        ({"task": "mine:dose", "metric": "error"}, "loss"),
    ],
)
def test_before_the_end_the_settings_say_it(settings, name):
    assert metric_of_settings(settings).name == name


def test_your_own_metrics_are_those_that_are_given():
    own = (Metric(name="error", label="error"), Metric(name="hits", label="hits"))
    assert metric_of_settings({"task": "mine:dose"}, own).name == "error"
    assert metric_of_settings({"task": "mine:dose", "metric": "hits"}, own).name == "hits"


def test_a_label_is_that_of_the_task():
    assert metric_named("accuracy", "multilabel").label == "accuracy of a label"
    assert {metric.name for metric in metrics_of("regression")} == {"rmse", "mae", "r2"}
    assert metrics_of("mine:dose") == ()


def test_headings_say_unit_and_direction():
    assert ACCURACY.heading == "accuracy (%)"
    assert (ACCURACY.directed, RMSE.directed) == ("accuracy", "RMSE (lower is better)")
    assert (RMSE.heading, R2.heading) == ("RMSE (lower is better)", "R2")
    assert (RMSE.title, ACCURACY.title) == ("RMSE", "Accuracy")
    assert metric_named("token_accuracy", "masked-lm").slug == "token-accuracy"


def test_lower_is_better_turns_the_order_around():
    assert RMSE.goodness(1.0) > RMSE.goodness(2.0)
    assert R2.goodness(0.5) > R2.goodness(0.1)


def test_stored_values_are_numbers_undefined_or_none():
    assert (value_of(None), value_of(UNDEFINED), value_of("inf"), value_of(3)) == (None, UNDEFINED, math.inf, 3.0)
    assert math.isnan(number_of(UNDEFINED))
    assert math.isnan(number_of(None))
    assert number_of("inf") == math.inf


def test_other_metrics_are_those_beside_the_main_one_and_the_loss():
    line = {"round": 1, "test_mae": 1.0, "test_rmse": 2.0, "test_loss": 4.0, "test_own_thing": 1.0, "epsilon": 1.0}
    assert [metric.label for metric in other_metrics(line, RMSE, "regression")] == ["MAE", "own thing"]
    assert metric_named("own_thing", "regression").heading == "own thing", "nothing is said of its direction"


def test_only_a_cross_entropy_is_in_nats():
    assert [loss_unit(task) for task in ("classification", "causal-lm", "regression", "mine:dose")] == [
        "nats", "nats", "", "",
    ]  # fmt: skip
    assert LOSS.goodness(1.0) > LOSS.goodness(2.0)
