"""The main metric of a run for its readers, from ``summary.json`` or the settings, and the values of metrics there."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fed_dpsat import plugins
from fed_dpsat.errors import InputError
from fed_dpsat.tasks.metric import UNDEFINED, Metric, Value

CLASSIFICATION = "classification"
IN_NATS = (CLASSIFICATION, "multilabel", "token-classification", "causal-lm", "masked-lm")
"""The tasks whose loss is a cross-entropy."""

LOSS = Metric(name="loss", label="loss", higher_is_better=False)


@functools.cache
def metrics_of(task: str) -> tuple[Metric, ...]:
    """The metrics of a built-in ``task``, the main one first; none of your own task, whose code no reader runs."""
    return tuple(getattr(plugins.builtin("task").get(task), "metrics", ()))


def metric_named(name: str, task: str) -> Metric:
    """The metric ``name`` of ``task``; the label of one of your own task is its name."""
    known = {metric.name: metric for metric in metrics_of(task)}
    return known.get(name) or Metric(name=name, label=name.replace("_", " "))


def task_of(settings: Mapping[str, Any]) -> str:
    """The task that ``settings`` or a summary names; those of a version without tasks are a classification."""
    return str(settings.get("task") or CLASSIFICATION)


def metric_of(summary: Mapping[str, Any]) -> Metric:
    """The main metric of a run that ended; accuracy for a version that had no other.

    Raises ``InputError`` if its description is damaged.
    """
    stated = summary.get("metric")
    if stated is None:
        return metrics_of(CLASSIFICATION)[0]
    kinds = {"name": str, "label": str, "higher_is_better": bool, "unit": str}
    if not isinstance(stated, dict) or any(not isinstance(stated.get(key), kind) for key, kind in kinds.items()):
        raise InputError(f"metric={stated!r} of a summary is not {', '.join(kinds)}; restore summary.json")
    return Metric(**{key: stated[key] for key in kinds})


def metric_of_settings(settings: Mapping[str, Any], metrics: Sequence[Metric] | None = None) -> Metric:
    """The main metric of a run before its end: of ``metrics``, the setting ``metric``, else the first one.

    ``metrics`` are by default those of a built-in task. The loss if the metric is not among them, as for your own task.
    """
    found = metrics_of(task_of(settings)) if metrics is None else metrics
    name = settings.get("metric") or (found[0].name if found else "")
    return next((metric for metric in found if metric.name == name), LOSS)


def other_metrics(values: Mapping[str, Any], main: Metric, task: str) -> list[Metric]:
    """The metrics in a summary or a line of ``rounds.jsonl`` of ``task`` beside ``main`` and the loss, in its order."""
    names = [key.removeprefix("test_") for key in values if key.startswith("test_")]
    return [metric_named(name, task) for name in names if name not in (main.name, LOSS.name)]


def loss_unit(task: str) -> str:
    """The unit of the loss of ``task``: nats for a cross-entropy, else none."""
    return "nats" if task in IN_NATS else ""


def value_of(stored: Any) -> Value | None:
    """A value of ``summary.json`` or ``rounds.jsonl``, in which inf and NaN are text, as a number if it is one."""
    return stored if stored is None or stored == UNDEFINED else float(stored)


def number_of(stored: Any) -> float:
    """A value as above as a number: NaN without one."""
    value = value_of(stored)
    return value if isinstance(value, float) else math.nan
