"""The main metric of a run as its readers see it: name, direction and unit, from ``summary.json`` or the settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fed_dpsat.errors import InputError

UNDEFINED = "undefined"
"""The value of a metric on a split on which it has none, such as AUROC on examples of one class."""

PERCENT = "%"
CLASSIFICATION = "classification"

Value = float | str | None
"""A number, ``UNDEFINED``, or None without an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of a task; with the unit "%", values are shares in [0, 1] that readers see in percent."""

    name: str
    label: str
    higher_is_better: bool
    unit: str

    @property
    def key(self) -> str:
        """Its key in ``summary.json`` and in the lines of ``rounds.jsonl``."""
        return f"test_{self.name}"

    @property
    def slug(self) -> str:
        """Its name in names of files and in ids of a page."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def title(self) -> str:
        """The label with a capital letter, for the start of a sentence."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def directed(self) -> str:
        """The label and, if a smaller value is better, the direction: for a column whose cells have the unit."""
        return self.label if self.higher_is_better else f"{self.label} (lower is better)"

    @property
    def heading(self) -> str:
        """Label, unit and, if a smaller value is better, the direction: for a column without units and an axis."""
        remarks = [self.unit] if self.unit else []
        remarks += [] if self.higher_is_better else ["lower is better"]
        return self.label + (f" ({', '.join(remarks)})" if remarks else "")

    @property
    def scale(self) -> int:
        """The factor from a stored value to a value in ``unit``."""
        return 100 if self.unit == PERCENT else 1

    def goodness(self, value: float) -> float:
        """A number that grows as ``value`` gets better; the same function ranks means."""
        return value if self.higher_is_better else -value


def _metrics(*rows: tuple[str, str, bool, str]) -> dict[str, Metric]:
    return {
        name: Metric(name=name, label=label, higher_is_better=higher, unit=unit) for name, label, higher, unit in rows
    }


METRICS = _metrics(
    ("accuracy", "accuracy", True, PERCENT),
    ("balanced_accuracy", "balanced accuracy", True, PERCENT),
    ("macro_f1", "macro F1", True, PERCENT),
    ("auroc", "AUROC", True, PERCENT),
    ("average_precision", "average precision", True, PERCENT),
    ("rmse", "RMSE", False, ""),
    ("mae", "MAE", False, ""),
    ("r2", "R2", True, ""),
    ("perplexity", "perplexity", False, ""),
    ("token_accuracy", "token accuracy", True, PERCENT),
)
"""The metrics of the built-in tasks by name."""

MAIN = {
    CLASSIFICATION: "accuracy",
    "multilabel": "macro_f1",
    "regression": "rmse",
    "token-classification": "macro_f1",
    "causal-lm": "perplexity",
    "masked-lm": "perplexity",
}
"""The main metric of each built-in task, unless the setting ``metric`` names another one."""

LOSS = Metric(name="loss", label="loss", higher_is_better=False, unit="")


def task_of(settings: Mapping[str, Any]) -> str:
    """The task that ``settings`` or a summary names; those of a version without tasks are a classification."""
    return str(settings.get("task") or CLASSIFICATION)


def metric_of(summary: Mapping[str, Any]) -> Metric:
    """The main metric of a run that ended; accuracy for a version that had no other.

    Raises ``InputError`` if its description is damaged.
    """
    stated = summary.get("metric")
    if stated is None:
        return METRICS[MAIN[CLASSIFICATION]]
    kinds = {"name": str, "label": str, "higher_is_better": bool, "unit": str}
    if not isinstance(stated, dict) or any(not isinstance(stated.get(key), kind) for key, kind in kinds.items()):
        raise InputError(f"metric={stated!r} of a summary is not {', '.join(kinds)}; restore summary.json")
    return Metric(**{key: stated[key] for key in kinds})


def metric_of_settings(settings: Mapping[str, Any]) -> Metric:
    """The main metric of a run before its end: the setting ``metric``, else that of the task.

    Only a summary describes a metric of your own task, so before the end of such a run it is the loss.
    """
    name = str(settings.get("metric") or MAIN.get(task_of(settings), LOSS.name))
    return METRICS.get(name, LOSS)


def other_metrics(values: Mapping[str, Any], main: Metric) -> list[Metric]:
    """The metrics in a summary or a line of ``rounds.jsonl`` beside ``main`` and the loss, in its order."""
    names = [key.removeprefix("test_") for key in values if key.startswith("test_")]
    return [metric_named(name) for name in names if name not in (main.name, LOSS.name)]


def metric_named(name: str) -> Metric:
    """The metric ``name``; one of your own task has its name as label, and its direction is not known here."""
    return METRICS.get(name) or Metric(name=name, label=name.replace("_", " "), higher_is_better=True, unit="")


def loss_unit(task: str) -> str:
    """The unit of the loss of ``task``: nats for a cross-entropy, else none."""
    return "nats" if task in MAIN and task != "regression" else ""


def value_of(stored: Any) -> Value:
    """A value of ``summary.json`` or ``rounds.jsonl``, in which inf and NaN are text, as a number if it is one."""
    return stored if stored is None or stored == UNDEFINED else float(stored)


def number_of(stored: Any) -> float:
    """A value as above as a number: NaN without one."""
    value = value_of(stored)
    return value if isinstance(value, float) else math.nan
