"""Runs as small JSON lines for a repository: the data that a comparison needs, without models and ledgers.

The first line holds the settings that all runs of the file share; each other line holds a run. All settings are stored,
so a later change of a default has no effect. Curves keep ``MAX_POINTS`` rounds, numbers five digits.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fed_dpsat.errors import InputError
from fed_dpsat.lab.report.bundles import bundles_of
from fed_dpsat.lab.report.labels import BUNDLES
from fed_dpsat.run.metric import LOSS, metric_of
from fed_dpsat.run.numbers import spread_out
from fed_dpsat.run.reading import load_run
from fed_dpsat.run.result import Run
from fed_dpsat.settings.config import MACHINE, RunConfig
from fed_dpsat.tasks.metric import Metric

FORMAT = "fed_dpsat runs 1"
MAX_POINTS = 11
KEPT = ("status", "ended_early", "privacy_unit", "threat_model", "noise")
SCORES = ("round", "measured_on", "num_examples", "num_nonfinite", "accuracy", "nll", "brier", "ece", "mce", "metrics")


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs of run folders, folders of run folders (also of a sweep) and ``.jsonl`` files; else ``InputError``."""
    found: list[Run] = []
    for path in paths:
        found += _read(path) if path.suffix == ".jsonl" else [_load(folder) for folder in _folders(path)]
    return found


def _load(folder: Path) -> Run:
    run = load_run(folder)
    return replace(run, environment={**run.environment, BUNDLES: bundles_of(folder)})


def _folders(path: Path) -> list[Path]:
    """``path`` if it holds a run, else the run folders in it or in ``runs`` (a sweep), without failed attempts."""
    if (path / "config.toml").exists():
        return [path]
    inside = sorted(file.parent for way in ("*", "runs/*") for file in path.glob(f"{way}/config.toml"))
    return [folder for folder in inside if ".failed-" not in folder.name] or [path]


def write_runs(runs: Sequence[Run], path: Path) -> None:
    """Write all ``runs`` into one file; raises ``InputError`` if it cannot be written."""
    settings = [{k: v for k, v in run.config.settings().items() if k not in MACHINE} for run in runs]
    for own in settings:
        for name in ("client_table", "statistics_from"):
            own[name] = Path(str(own[name])).name  # without its folder
    common = {k: v for k, v in settings[0].items() if all(other[k] == v for other in settings)}
    lines: list[dict[str, Any]] = [{"format": FORMAT, "settings": common}]
    for run, own in zip(runs, settings, strict=True):
        evaluated = run.evaluated
        shown = [evaluated[i] for i in spread_out(len(evaluated), MAX_POINTS)]
        lines.append(
            {
                "name": run.name,
                "settings": {k: v for k, v in own.items() if k not in common},
                "objects": run.objects,
                **({BUNDLES: bundles} if (bundles := run.environment.get(BUNDLES)) else {}),
                "packages": {
                    k: v for k, v in run.environment.get("packages", {}).items() if k in ("fed-dpsat", "torch")
                },
                "epsilon": _short(run.epsilon),
                "summary": {
                    **{key: run.summary.get(key) for key in KEPT},
                    "task": run.task,
                    "metric": dataclasses.asdict(run.metric),
                },
                "quality": {k: _short(run.quality[k]) for k in SCORES if k in run.quality} if run.quality else None,
                "rounds": {key: [_short(line[key]) for line in shown] for key in _curves(run.metric)},
            }
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n" for line in lines))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another path with --out") from None


def _read(path: Path) -> list[Run]:
    try:
        head, *lines = (json.loads(line) for line in path.read_text().splitlines())
        if head["format"] != FORMAT:
            raise InputError(f"{path} has the format {head['format']!r}, not {FORMAT!r}; write it again")
        return [_run(line, head["settings"]) for line in lines]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a file of `fed-dpsat compare --out` ({error!r}); write it again") from None


def _run(line: dict[str, Any], common: dict[str, Any]) -> Run:
    curves, quality = _curves(metric_of(line["summary"])), line["quality"]
    columns = [[_long(value) for value in line["rounds"][key]] for key in curves]
    return Run(
        path=Path(line["name"]),
        config=RunConfig.from_mapping({**common, **line["settings"]}),
        environment={"objects": line["objects"], "packages": line["packages"], BUNDLES: line.get(BUNDLES, {})},
        rounds=tuple(dict(zip(curves, values, strict=True)) for values in zip(*columns, strict=True)),
        timing=(),
        summary=line["summary"],
        quality={key: _long(value) for key, value in quality.items()} if quality else None,
        simulation=None,
        sharpness=None,
        epsilon=float(line["epsilon"]),
        missing=(),
    )


def _curves(metric: Metric) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("round", metric.key, LOSS.key, "epsilon")))


def _short(value: Any) -> Any:
    """Five significant digits; inf and NaN as text; also of each value of a dict."""
    if isinstance(value, dict):
        return {name: _short(of) for name, of in value.items()}
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)


def _long(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _long(of) for name, of in value.items()}
    return float(value) if value in ("inf", "-inf", "nan") else value
