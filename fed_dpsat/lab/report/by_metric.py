"""Runs with another metric of their task as the main one, for a comparison by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fed_dpsat.errors import SettingError
from fed_dpsat.run.metric import metrics_of
from fed_dpsat.run.result import Run


def by_metric(runs: Sequence[Run], name: str) -> list[Run]:
    """``runs`` with the metric ``name`` in place of the main one.

    Its values are those of each round, if the run stated them (the metric of a regression or a text), else the one of
    the last evaluated model in ``quality.json``. Runs that did not end are left as they are. Raises ``SettingError``
    for a name of which a complete run has no value, or whose direction and unit are unknown: your own task states
    these for its main metric alone.
    """
    return [_with(run, name) if run.status == "completed" and run.metric.name != name else run for run in runs]


def _with(run: Run, name: str) -> Run:
    known = {metric.name: metric for metric in metrics_of(run.task)}
    values: Mapping[str, Any] = {**_last_of_rounds(run), **(run.quality or {}).get("metrics", {})}
    if name not in known or name not in values:
        there = [run.metric.name, *(other for other in known if other in values and other != run.metric.name)]
        raise SettingError(
            "--metric", name, f"in {run.name}, whose metrics are {', '.join(there)}", "name one that all runs have"
        )
    metric = known[name]
    rounds = [{metric.key: None, **line} for line in run.rounds]
    if metric.key not in run.rounds[-1] and run.evaluated:
        rounds[run.rounds.index(run.evaluated[-1])][metric.key] = values[name]
    return dataclasses.replace(run, rounds=tuple(rounds), summary={**run.summary, "metric": dataclasses.asdict(metric)})


def _last_of_rounds(run: Run) -> Mapping[str, Any]:
    if not run.evaluated:
        return {}
    return {key.removeprefix("test_"): value for key, value in run.evaluated[-1].items() if key.startswith("test_")}
