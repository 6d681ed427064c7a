"""A sweep from its file to its tables: tune each cell on validation examples, then run the choice on all seeds.

================= ========================================================================
file              content
================= ========================================================================
sweep.json        the sweep, its metric, versions, the reduction to a budget, and the chosen settings
results.csv       a row per run, rewritten after each run; ``results.parquet`` has the same content
summary.csv       a row per cell and candidate: n, mean, standard deviation, 95 % half width
runs/             a folder per run; ``<run>.log`` holds its warnings
sweep.lock        the lock of an active sweep
================= ========================================================================
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.lab.sweep.budget import Cost, Kind, kind, minutes, shrink
from fed_dpsat.lab.sweep.execute import Attempt, completed, execute, locked
from fed_dpsat.lab.sweep.reading import read_spec
from fed_dpsat.lab.sweep.spec import Cell, Run, Settings, Spec
from fed_dpsat.lab.sweep.tables import Outcome, Row, metric_of_sweep, row, summarise, write
from fed_dpsat.run.folder import jsonable, surroundings
from fed_dpsat.run.metric import LOSS
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation.jobs import Jobs, open_jobs
from fed_dpsat.tasks.metric import Metric

NOT_COUNTED = (
    "the search for hyper-parameters used validation examples of the private training data, and these tables show "
    "results on them without noise; epsilon does not cover that"
)

NOT_SEARCHED = "no hyper-parameters were searched; epsilon of a row does not cover a choice among the rows"

Shown = Callable[["Event"], None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """The end of a run, or its first failure before a second try; ``done`` of ``total`` runs have ended."""

    outcome: Outcome
    retried: bool
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Swept:
    """The result of a sweep: rows of ``summary.csv``, the ``columns`` in which they differ, failures, omitted parts."""

    metric: Metric
    columns: list[str]
    summary: list[Row]
    failed: list[Outcome]
    left_out: list[str]
    privacy: str


def run_sweep(
    path: Path,
    out: Path,
    *,
    workers: int = 0,
    budget: float | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    show: Shown | None = None,
) -> Swept:
    """Run the sweep file ``path`` into the folder ``out``, or resume it there.

    A complete run in ``out`` does not run again. A run that fails starts a second time from its beginning. ``budget``
    in minutes: if one measured run of each kind predicts more, ``shrink`` reduces the sweep.

    Raises ``InputError`` before the first run for an invalid file, invalid settings of a run, or an unusable folder.
    """
    spec = read_spec(path, overrides, only)
    gpus_per_worker = _gpus_per_worker(spec, workers)
    if budget is not None and not 0 < budget < math.inf:
        raise SettingError("--budget", budget, "in (0, inf) minutes", "leave it out for no limit")
    if (out / "config.toml").exists() or (out.exists() and not out.is_dir()):
        raise SettingError("out", str(out), "a folder of a sweep, or new", "name another folder with --out")
    _build_one_of_each(spec)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "sweep.lock") as mine:
        if not mine:
            raise SettingError("out", str(out), "free: another sweep is active there", "wait, or name another folder")
        with open_jobs(workers, str(spec.base.get("ray_address", "")), gpus_per_worker) as jobs:
            return _Sweep(spec, path, out, jobs, workers, show).run(budget)


class _Sweep:
    """The state of an active sweep."""

    def __init__(self, spec: Spec, path: Path, out: Path, jobs: Jobs, workers: int, show: Shown | None) -> None:
        self.spec, self.out, self.jobs, self.workers, self.show = spec, out, jobs, workers, show
        self.outcomes: dict[str, Outcome] = {}
        self.chosen: dict[tuple[str, ...], Settings] = {}
        self.places = {cell.key: place for place, cell in enumerate(spec.cells())}
        self.total = 0
        self.about: dict[str, Any] = {
            "file": str(path),
            **surroundings(),
            "workers": workers,
            "privacy": NOT_COUNTED if spec.tune_seeds else NOT_SEARCHED,
            "metric": dataclasses.asdict(self._metric()),
            "asked": dataclasses.asdict(spec),
        }

    def run(self, budget: float | None) -> Swept:
        left_out = [] if budget is None else self._reduce(budget)
        self._note(left_out=left_out, planned=dataclasses.asdict(self.spec))
        cells = self.spec.cells()
        self.total = sum(len(self.spec.tune_runs(c)) + len(self.spec.seeds) for c in cells)
        self._run([run for cell in cells for run in self.spec.tune_runs(cell)])
        final: list[Run] = []
        for cell in cells:
            tuned = self._choose(cell)
            if tuned is None:
                self.total -= len(self.spec.seeds)
                continue
            self.chosen[cell.key] = tuned
            final += self.spec.final_runs(cell, tuned)
        self._note(chosen=[{**cell.labels, **self.chosen.get(cell.key, {})} for cell in cells if cell.tune])
        self._run(final)
        summary = self._write()
        failed = [outcome for outcome in self.outcomes.values() if outcome.error]
        columns = [*self.spec.axes, *(key for key in self.spec.tuned if key not in self.spec.axes)]
        self._note(metric=dataclasses.asdict(self._metric()))
        return Swept(
            metric=self._metric(),
            columns=columns,
            summary=summary,
            failed=failed,
            left_out=left_out,
            privacy=self.about["privacy"],
        )

    def _run(self, runs: Sequence[Run]) -> None:
        """Execute the incomplete ``runs``, each at most twice."""
        waiting = []
        for run in runs:
            if summary := completed(self._folder(run)):
                self._end(run, summary)
            else:
                waiting.append(Attempt(run=run, folder=self._folder(run)))
        if runs:
            self._write()
        again = []
        for done in self.jobs.run(execute, waiting):
            if done.value is None:
                again.append(dataclasses.replace(done.job, fresh=True))
                self._tell(self._outcome(done.job.run, {}, done.error), retried=True)
            else:
                self._end(done.job.run, done.value.summary)
                self._write()
        for done in self.jobs.run(execute, again):
            self._end(done.job.run, done.value.summary if done.value else {}, done.error)
            self._write()

    def _choose(self, cell: Cell) -> Settings | None:
        """The candidate with the best mean metric on validation examples, then the smallest mean loss, then the first.

        A candidate does not count if a run failed, or if its metric is undefined; None if all failed. Raises
        ``RunError`` if the metric is undefined for all others.
        """
        metric, undefined = self._metric(), False
        best: tuple[tuple[float, float], Settings] | None = None
        if not cell.tune:
            return {}
        found_of: dict[tuple[Any, ...], list[Outcome]] = {}
        for run in self.spec.tune_runs(cell):
            found_of.setdefault(tuple(run.tuned.items()), []).append(self.outcomes[run.folder_name])
        for found in found_of.values():
            if any(outcome.error for outcome in found):
                continue
            tuned = found[0].run.tuned
            scores = [score for outcome in found if (score := outcome.number(metric.key)) is not None]
            if len(scores) < len(found):
                undefined = True
                continue
            loss = fmean(outcome.number(LOSS.key) or 0.0 for outcome in found)
            rank = _finite(metric.goodness(fmean(scores))), _finite(LOSS.goodness(loss))
            if best is None or rank > best[0]:
                best = rank, tuned
        if undefined and best is None:
            raise RunError(
                f"{cell.name or 'the only cell'}: {metric.label} is undefined on the validation examples for each "
                "candidate, so none can be chosen; give values for which training does not diverge, raise "
                "tune.validation_share if the examples lack a class, or name another metric in the base"
            )
        return best[1] if best else None

    def _metric(self) -> Metric:
        return metric_of_sweep(self.spec, self.outcomes.values())

    def _reduce(self, budget: float) -> list[str]:
        """Reduce the sweep to ``budget``, by an earlier decision or a run of each kind; returns the omitted parts."""
        key = f"{self.spec.digest()} {budget:g} {self.workers}"
        if (known := self._noted().get("plan", {})).get("key") != key:
            costs = self._measure()
            smaller, left_out = shrink(self.spec, costs, budget, self.workers)
            known = {
                "key": key,
                "budget_minutes": budget,
                "estimated_minutes": minutes(smaller, costs, self.workers),
                "estimated_minutes_of_all": minutes(self.spec, costs, self.workers),
                "costs": [{"kind": " ".join(k), **dataclasses.asdict(cost)} for k, cost in costs.items()],
                "seeds": smaller.seeds,
                "tune_seeds": smaller.tune_seeds,
                "rounds_share": smaller.rounds_share,
                "left_out": left_out,
            }
        self.about["plan"] = known
        self.spec = dataclasses.replace(
            self.spec,
            seeds=tuple(known["seeds"]),
            tune_seeds=tuple(known["tune_seeds"]),
            rounds_share=known["rounds_share"],
        )
        return list(known["left_out"])

    def _measure(self) -> dict[Kind, Cost]:
        """Measure one run of each kind under the full load; a complete run counts with its own seconds."""
        first: dict[Kind, Run] = {}
        for cell in self.spec.cells():
            runs = [*self.spec.tune_runs(cell), *self.spec.final_runs(cell, cell.candidates()[0])]
            first.setdefault(kind(cell), runs[0])
        costs, waiting = dict[Kind, Cost](), []
        for which, run in first.items():
            if summary := completed(self._folder(run)):
                costs[which] = Cost(fixed=1.0, rounds=float(summary["seconds"]))
            else:
                waiting.append(Attempt(run=run, folder=self._folder(run)))
        for done in self.jobs.run(execute, waiting):
            if done.value is None:
                raise RunError(f"{done.job.run.name}, the run that measures the time, failed: {done.error}")
            rounds = float(done.value.summary["seconds"])
            costs[kind(done.job.run.cell)] = Cost(fixed=max(done.value.wall_seconds - rounds, 0.0), rounds=rounds)
        return {which: costs[which] for which in first}

    def _folder(self, run: Run) -> Path:
        return self.out / "runs" / run.folder_name

    def _outcome(self, run: Run, summary: Mapping[str, Any], error: str = "") -> Outcome:
        return Outcome(run=run, folder=f"runs/{run.folder_name}", summary=summary, error=error)

    def _end(self, run: Run, summary: Mapping[str, Any], error: str = "") -> None:
        self.outcomes[run.folder_name] = self._outcome(run, summary, error)
        self._tell(self.outcomes[run.folder_name], retried=False)

    def _tell(self, outcome: Outcome, *, retried: bool) -> None:
        if self.show:
            self.show(Event(outcome=outcome, retried=retried, done=len(self.outcomes), total=self.total))

    def _write(self) -> list[Row]:
        outcomes = sorted(self.outcomes.values(), key=self._place)
        metric = self._metric()
        summary = summarise(self.spec, outcomes, self.chosen, metric)
        write(self.out, [row(self.spec, outcome, metric) for outcome in outcomes], summary)
        return summary

    def _place(self, outcome: Outcome) -> tuple[Any, ...]:
        """The position in the file, independent of the order in which runs end."""
        run = outcome.run
        tuned = run.cell.candidates().index(run.tuned)
        seed = (*self.spec.tune_seeds, *self.spec.seeds).index(run.seed)
        return run.stage != "tune", self.places[run.cell.key], tuned, seed

    def _noted(self) -> dict[str, Any]:
        path = self.out / "sweep.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def _note(self, **more: Any) -> None:
        self.about |= more
        temporary = self.out / "sweep.json.tmp"
        temporary.write_text(json.dumps(jsonable(self.about), indent=2) + "\n")
        os.replace(temporary, self.out / "sweep.json")


def _finite(goodness: float) -> float:
    return goodness if math.isfinite(goodness) else -math.inf


def _gpus_per_worker(spec: Spec, workers: int) -> float:
    """The value in the base; raises ``SettingError`` if it does not fit ``--workers``."""
    base = {name: spec.base[name] for name in ("device", "gpus_per_worker") if name in spec.base}
    config = RunConfig.from_mapping({**base, "workers": workers, "private": False})
    if workers and config.device == "auto" and not config.gpus_per_worker:
        raise SettingError("device", "auto", "possible with --workers and no gpus_per_worker", "say cpu or cuda")
    return config.gpus_per_worker


def _build_one_of_each(spec: Spec) -> None:
    """Build the objects of a run per bundle and value, to find missing names and data before the first run."""
    seen: set[str] = set()
    for cell in spec.cells():
        new = set(cell.key) - seen
        if new or not seen:
            Experiment.build(spec.final_runs(cell, cell.candidates()[0])[0].config)
            seen |= set(cell.key) or {""}
