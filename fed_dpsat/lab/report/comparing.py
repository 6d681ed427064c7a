"""Groups of runs that differ in their settings, with means and intervals over seeds.

=================================== ===========================================================================
case                                what happens
=================================== ===========================================================================
one seed                            no interval; a note
a seed twice under equal settings   counts once, because equal seeds give equal runs; a note
not completed                       not in the means; a note for each reason, with the names of a few runs
other delta, accountant, unit or    a front of metric against epsilon only within equal groups; the table states
adversary, or other test examples   the difference
other task or metric                ``InputError``: their values have no common scale
metric undefined in a run           the group has no mean, is last and in no figure; a note
objects from Python                 grouped by their names; a note, because settings do not describe them
=================================== ===========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from fed_dpsat.errors import InputError
from fed_dpsat.lab.report.labels import BUDGET, labels_of
from fed_dpsat.run.numbers import Estimate, estimate
from fed_dpsat.run.result import Run
from fed_dpsat.settings.config import MACHINE
from fed_dpsat.tasks.metric import Metric

NOT_THE_METHOD = MACHINE | {"seed", "evaluate_every", "metric"}
"""Settings that may differ between the runs of one group."""

FEW_NAMES = 3
"""A note names at most this many runs."""

ALIKE = 0.005

PROMISE_WORDS = {"delta": "delta", "accountant": "accountant", "unit": "privacy unit", "threat_model": "adversary"}


@dataclass(frozen=True, kw_only=True)
class Promise:
    """The meaning of an epsilon; only epsilons with equal promises are comparable."""

    unit: str
    threat_model: str
    delta: float
    accountant: str

    @classmethod
    def of(cls, run: Run) -> Promise:
        """The promise of the summary of ``run``."""
        return cls(
            unit=str(run.summary.get("privacy_unit", "unknown")),
            threat_model=str(run.summary.get("threat_model", "unknown")),
            delta=run.config.delta,
            accountant=run.config.accountant,
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ only in the seed; ``epsilon`` is the highest of the runs.

    ``score`` is the main metric in its unit, None if it is undefined in a run. ``calibration`` is the ECE; loss and ECE
    are None if a run lacks them. Groups of a ``family`` differ only in BUDGET.
    """

    label: str
    family: str
    settings: dict[str, str]
    runs: tuple[Run, ...]
    promise: Promise
    score: Estimate | None
    loss: Estimate | None
    calibration: Estimate | None
    epsilon: float
    on_front: bool = False

    @property
    def measured_on(self) -> str:
        """The examples of the metric, if the runs name them."""
        return " and ".join(sorted({str(run.quality["measured_on"]) for run in self.runs if run.quality}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        return tuple(sorted(run.config.seed for run in self.runs))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Groups from the best value of ``metric`` to the worst, the settings in which they differ, and notes."""

    task: str
    metric: Metric
    groups: tuple[Group, ...]
    differing: tuple[str, ...]
    common: dict[str, str]
    notes: tuple[str, ...] = field(default=())

    @property
    def promises(self) -> set[Promise]:
        """The distinct promises; with more than one, epsilons of different groups are not comparable."""
        return {group.promise for group in self.groups if math.isfinite(group.epsilon)}


def compare(runs: Sequence[Run]) -> Comparison:
    """Group ``runs`` by their differing settings.

    Raises ``InputError`` without a complete run, and for runs of different tasks or metrics.
    """
    notes: list[str] = []
    whole = [run for run in runs if run.status == "completed" and run.score is not None]
    for status, of in _alike((_state(run), run) for run in runs if run not in whole):
        notes.append(f"{_named(of)} {'is' if len(of) == 1 else 'are'} {status} and not in the means.")
    for reason, of in _alike((run.summary.get("ended_early"), run) for run in whole):
        notes += [f"{_named(of)} ended before: {reason}."] if reason else []
    if not whole:
        raise InputError(f"0 of {len(runs)} runs are complete; resume them with `fed-dpsat resume`")
    task, metric = _common_metric(whole)
    described = [_described(run) for run in whole]
    differing = tuple(name for name in described[0] if len({settings[name] for settings in described}) > 1)
    if any(run.objects for run in whole):
        notes.append("Some runs have objects from Python, so equal settings do not imply equal runs.")
    if any(run.config.evaluated_on == "clients" for run in whole):
        notes.append("Some runs were evaluated by clients: their metrics have noise, and reports of runs say how much.")
    members: dict[tuple[str, ...], dict[int, Run]] = {}
    for run, settings in zip(whole, described, strict=True):
        group = members.setdefault(tuple(settings[name] for name in differing), {})
        if run.config.seed in group:
            notes.append(f"{run.name} has the settings and the seed of {group[run.config.seed].name}: counted once.")
        group.setdefault(run.config.seed, run)
    settings_of = [dict(zip(differing, key, strict=True)) for key in members]
    runs_of = [tuple(group.values()) for group in members.values()]
    firsts = [of[0] for of in runs_of]
    labels, families = labels_of(settings_of, firsts), labels_of(settings_of, firsts, without=BUDGET)
    shown = list(map(_group, settings_of, runs_of, labels, families))
    if sizes := [group for group in shown if len(group.runs) == 1]:
        notes.append(f"{len(sizes)} of {len(shown)} groups have one seed, so no interval: their results may be chance.")
    if lost := [group for group in shown if group.score is None]:
        notes.append(f"{metric.title} is undefined on the examples of a run in {len(lost)} of {len(shown)} groups.")
    ordered = sorted(_with_front(shown, metric), key=lambda group: -goodness(group, metric))
    common = {name: described[0][name] for name in described[0] if name not in differing}
    found = Comparison(task=task, metric=metric, groups=tuple(ordered), differing=differing, common=common)
    return replace(found, notes=tuple(_about_promises(found.promises) + _about_examples(ordered) + notes))


def goodness(group: Group, metric: Metric) -> float:
    """A number that grows as the mean of ``group`` gets better; the least one without a finite mean."""
    score = group.score
    return metric.goodness(score.mean) if score and math.isfinite(score.mean) else -math.inf


def pareto(points: Iterable[tuple[float, float]]) -> list[bool]:
    """Whether each ``(epsilon, goodness)`` is on the Pareto front: no other point is better in one and as good in both.

    A point without a finite mean has the goodness -inf and is not on it. Epsilons within ``ALIKE`` of each other count
    as equal, because calibration has this tolerance.
    """
    known = list(points)
    return [
        good > -math.inf
        and not any(
            (e <= epsilon * (1 + ALIKE) and g > good) or (e * (1 + ALIKE) < epsilon and g >= good) for e, g in known
        )
        for epsilon, good in known
    ]


def _common_metric(runs: Sequence[Run]) -> tuple[str, Metric]:
    kinds: dict[tuple[str, Metric], list[Run]] = {}
    for run in runs:
        kinds.setdefault((run.task, run.metric), []).append(run)
    if len(kinds) > 1:
        shown = [
            f"{metric.label} of {task} in {of[0].name}" + (f" and {len(of) - 1} more" if of[1:] else "")
            for (task, metric), of in kinds.items()
        ]
        raise InputError(
            f"these runs have different metrics, whose values have no common scale: {'; '.join(shown)}; compare the "
            "runs of each metric by themselves"
        )
    return next(iter(kinds))


def _described(run: Run) -> dict[str, str]:
    settings = {name: str(value) for name, value in run.config.settings().items() if name not in NOT_THE_METHOD}
    return {**settings, "objects": ", ".join(run.objects)}


def _group(settings: dict[str, str], runs: tuple[Run, ...], label: str, family: str) -> Group:
    metric = runs[0].metric
    scores = [metric.scale * run.score for run in runs if isinstance(run.score, float)]
    losses = [line["test_loss"] for run in runs for line in run.evaluated[-1:]]
    calibration = [run.quality["ece"] for run in runs if run.quality and "ece" in run.quality]
    return Group(
        label=label,
        family=family,
        settings=settings,
        runs=runs,
        promise=Promise.of(runs[0]),
        score=estimate(scores) if len(scores) == len(runs) else None,
        loss=estimate(losses) if len(losses) == len(runs) else None,
        calibration=estimate(calibration) if len(calibration) == len(runs) else None,
        epsilon=max(run.epsilon for run in runs),
    )


def _alike(runs: Iterable[tuple[str | None, Run]]) -> Iterable[tuple[str | None, list[Run]]]:
    """The runs of each reason, in the order of its first one."""
    found: dict[str | None, list[Run]] = {}
    for reason, run in runs:
        found.setdefault(reason, []).append(run)
    return found.items()


def _state(run: Run) -> str:
    return "without an evaluation" if run.status == "completed" else run.status


def _named(runs: Sequence[Run]) -> str:
    names = ", ".join(run.name for run in runs[:FEW_NAMES])
    if len(runs) == 1:
        return names
    return f"{len(runs)} runs ({names}{f' and {len(runs) - FEW_NAMES} more' if runs[FEW_NAMES:] else ''})"


def _with_front(groups: list[Group], metric: Metric) -> list[Group]:
    found = []
    for kind in {(group.promise, group.measured_on): None for group in groups}:
        alike = [group for group in groups if (group.promise, group.measured_on) == kind]
        on_front = pareto((group.epsilon, goodness(group, metric)) for group in alike)
        found += [replace(group, on_front=on) for group, on in zip(alike, on_front, strict=True)]
    return found


def _about_examples(groups: Sequence[Group]) -> list[str]:
    kinds = sorted({group.measured_on for group in groups})
    if len(kinds) < 2:
        return []
    return [
        f"Groups have different test examples ({' / '.join(kind or 'unknown' for kind in kinds)}). Fronts are separate."
    ]


def _about_promises(promises: set[Promise]) -> list[str]:
    """A warning with each part of the promise in which the groups differ."""
    if len(promises) < 2:
        return []
    words = []
    for name, said in PROMISE_WORDS.items():
        values = sorted({str(getattr(promise, name)) for promise in promises})
        words += [f"{said} ({' / '.join(values)})"] if len(values) > 1 else []
    return [f"Epsilons of these groups are not comparable: they differ in {' and '.join(words)}. Fronts are separate."]
