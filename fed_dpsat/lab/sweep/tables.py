"""The tables of a sweep: ``results``, a row per run (CSV and Parquet), and ``summary``, a row per cell."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fed_dpsat.lab.sweep.spec import Run, Settings, Spec
from fed_dpsat.lab.sweep.statistics import deviation, half_width
from fed_dpsat.run.metric import LOSS, metric_of, metric_of_settings, value_of
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.values import Scalar
from fed_dpsat.tasks.metric import Metric

Row = dict[str, Any]
Chosen = Mapping[tuple[str, ...], Settings]
"""The chosen settings by the key of a cell."""

FAILED, COMPLETED = "failed", "completed"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a run: its summary, or the reason of its failure in ``error``."""

    run: Run
    folder: str
    summary: Mapping[str, Any]
    error: str = ""

    def number(self, key: str) -> float | None:
        """A number of the summary, in which inf and NaN are text; None if it is missing or undefined."""
        value = value_of(self.summary.get(key))
        return None if isinstance(value, str) else value


def metric_of_sweep(spec: Spec, outcomes: Iterable[Outcome]) -> Metric:
    """The main metric of all runs: as the first complete one states it, else that of the settings."""
    stated = (metric_of(outcome.summary) for outcome in outcomes if outcome.summary)
    return next(stated, metric_of_settings(spec.base))


def row(spec: Spec, outcome: Outcome, metric: Metric) -> Row:
    """One run: its place in the grid, its settings and its result; None for an unknown or undefined value."""
    run, config, number = outcome.run, outcome.run.config, outcome.number
    return {
        **_place(spec, run),
        "seed": run.seed,
        "split": config.evaluated_on,
        "delta": config.delta,
        "noise_multiplier": number("noise_multiplier"),
        "epsilon": number("epsilon"),
        metric.name: number(metric.key),
        LOSS.name: number(LOSS.key),
        "rounds": outcome.summary.get("rounds_completed"),
        "seconds": number("seconds"),
        "status": FAILED if outcome.error else COMPLETED,
        "error": outcome.error,
        "folder": outcome.folder,
    }


def summarise(spec: Spec, outcomes: Sequence[Outcome], chosen: Chosen, metric: Metric) -> list[Row]:
    """A row per stage, cell and tuned settings: n, mean, sample standard deviation, 95 % half width, failures.

    The statistics of ``metric`` are None if it is undefined in a run of the row. ``at_edge`` names settings whose
    chosen value is at the end of its list: a better value may be outside.
    """
    groups: dict[object, list[Outcome]] = {}
    for outcome in outcomes:
        run = outcome.run
        groups.setdefault((run.stage, run.cell.key, tuple(run.tuned.items())), []).append(outcome)
    return [_summary(spec, group, chosen, metric) for group in groups.values()]


def _summary(spec: Spec, group: Sequence[Outcome], chosen: Chosen, metric: Metric) -> Row:
    run, done = group[0].run, [outcome for outcome in group if not outcome.error]

    def numbers(key: str) -> list[float]:
        return [value for outcome in done if (value := outcome.number(key)) is not None]

    scores = numbers(metric.key)
    scores = scores if len(scores) == len(done) else []
    is_chosen = bool(run.tuned) and chosen.get(run.cell.key) == run.tuned
    return {
        **_place(spec, run),
        "split": run.config.evaluated_on,
        "n": len(done),
        "failed": len(group) - len(done),
        f"{metric.name}_mean": fmean(scores) if scores else None,
        f"{metric.name}_sd": deviation(scores),
        f"{metric.name}_ci95": half_width(scores),
        "loss_mean": fmean(numbers("test_loss")) if done else None,
        "epsilon_max": max(numbers("epsilon"), default=None),
        "delta": run.config.delta,
        "seconds_mean": fmean(numbers("seconds")) if done else None,
        "chosen": is_chosen,
        "at_edge": " ".join(at_edge(run.cell.tune, run.tuned)) if is_chosen else "",
    }


def _place(spec: Spec, run: Run) -> Row:
    """Stage, label on each axis, and the settings that vary; for an axis of values, the two are equal."""
    settings = run.config.settings()
    return {"stage": run.stage, **run.cell.labels, **{key: settings[key] for key in spec.settings}}


def at_edge(tune: Mapping[str, Sequence[Scalar]], chosen: Mapping[str, Scalar]) -> list[str]:
    """Tuned numbers whose chosen value is the least or largest of at least three, and not the bound of the setting."""
    found = []
    for key, values in tune.items():
        numbers = sorted(v for v in values if isinstance(v, int | float) and not isinstance(v, bool))
        bound = RunConfig.__dataclass_fields__[key].metadata["least"]
        if len(numbers) > 2 and chosen[key] in (numbers[0], numbers[-1]) and chosen[key] != bound:
            found.append(key)
    return found


def write(folder: Path, rows: Sequence[Row], summary: Sequence[Row]) -> None:
    """Write ``results.csv``, ``results.parquet`` and ``summary.csv``, each atomically."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    for name, table in (("results", rows), ("summary", summary)):
        text = io.StringIO()
        if table:
            writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        _replace(folder / f"{name}.csv", text.getvalue().encode())
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    _replace(folder / "results.parquet", buffer.getvalue())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
