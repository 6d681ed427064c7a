"""Many runs as groups that differ in their settings, with means and intervals over seeds.

=================================== ===========================================================================
case                                what happens
=================================== ===========================================================================
one seed                            no interval; it is said
a seed twice under equal settings   counted once, as equal seeds are equal runs; said
not completed                       left out of the means; said
other delta, accountant, unit or    groups stay apart: a front of accuracy against epsilon is drawn within equal
adversary, or other test examples   ones alone, and the table says what differs
objects from Python                 grouped by what they are called; said, since settings do not describe them
=================================== ===========================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fed_dpsat.errors import InputError
from fed_dpsat.lab.report.numbers import Estimate, estimate
from fed_dpsat.lab.report.reading import Run
from fed_dpsat.settings.config import MACHINE

NOT_THE_METHOD = MACHINE | {"seed", "evaluate_every"}
"""Settings that may differ between the runs of one group."""

NAMES = ("optimizer", "base_optimizer", "strategy", "dataset", "model")
"""Settings whose value says what they are."""

BUDGET = ("target_epsilon", "noise_multiplier", "delta")
"""Settings that say how much is spent, and not what on."""

FEW_SETTINGS = 3
"""As many that differ are in a group's label, whatever their values."""

ALIKE = 0.005

PROMISE_WORDS = {"delta": "delta", "accountant": "accountant", "unit": "privacy unit", "threat_model": "adversary"}


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What an epsilon is an epsilon of: only those with equal promises may be compared."""

    unit: str
    threat_model: str
    delta: float
    accountant: str

    @classmethod
    def of(cls, run: Run) -> Promise:
        """As the summary says it."""
        return cls(
            unit=str(run.summary.get("privacy_unit", "unknown")),
            threat_model=str(run.summary.get("threat_model", "unknown")),
            delta=run.config.delta,
            accountant=run.config.accountant,
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of equal settings but for the seed. Accuracy in percent; ``epsilon`` is the highest of them.

    ``calibration`` is the ECE; loss and ECE are None where a run has none. A ``family`` differs in its budget alone.
    """

    label: str
    family: str
    settings: dict[str, str]
    runs: tuple[Run, ...]
    promise: Promise
    accuracy: Estimate
    loss: Estimate | None
    calibration: Estimate | None
    epsilon: float
    on_front: bool = False

    @property
    def measured_on(self) -> str:
        """The examples behind its accuracy, as far as the runs say."""
        return " and ".join(sorted({str(run.quality["measured_on"]) for run in self.runs if run.quality}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """In order."""
        return tuple(sorted(run.config.seed for run in self.runs))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Groups by falling accuracy; ``differing`` are the settings that tell them apart; ``notes`` are to be read."""

    groups: tuple[Group, ...]
    differing: tuple[str, ...]
    common: dict[str, str]
    notes: tuple[str, ...] = field(default=())

    @property
    def promises(self) -> set[Promise]:
        """More than one: epsilons of different groups are not comparable."""
        return {group.promise for group in self.groups if math.isfinite(group.epsilon)}


def compare(runs: Sequence[Run]) -> Comparison:
    """Grouped by what differs. Raises ``InputError`` where no run is complete."""
    notes: list[str] = []
    whole = [run for run in runs if run.status == "completed" and run.accuracy is not None]
    notes += [f"{run.name} is {run.status} and not in the means." for run in runs if run not in whole]
    for run in whole:
        notes += [f"{run.name} ended before: {reason}."] if (reason := run.summary.get("ended_early")) else []
    if not whole:
        raise InputError(f"none of {len(runs)} runs is complete; resume them with `fed-dpsat resume`")
    described = [_described(run) for run in whole]
    differing = tuple(name for name in described[0] if len({settings[name] for settings in described}) > 1)
    if any(run.objects for run in whole):
        notes.append("Some runs were given objects in Python: that their settings agree does not make them alike.")
    usual = {name: Counter(settings[name] for settings in described).most_common(1)[0][0] for name in differing}
    members: dict[tuple[str, ...], dict[int, Run]] = {}
    for run, settings in zip(whole, described, strict=True):
        group = members.setdefault(tuple(settings[name] for name in differing), {})
        if run.config.seed in group:
            notes.append(f"{run.name} has the settings and the seed of {group[run.config.seed].name}: counted once.")
        group.setdefault(run.config.seed, run)
    shown = [
        _group(dict(zip(differing, key, strict=True)), usual, list(group.values())) for key, group in members.items()
    ]
    if sizes := [group for group in shown if group.accuracy.n == 1]:
        notes.append(
            f"{len(sizes)} of {len(shown)} groups have one seed, so no interval: what they show may be chance."
        )
    ordered = sorted(_with_front(shown), key=lambda group: -group.accuracy.mean)
    common = {name: described[0][name] for name in described[0] if name not in differing}
    found = Comparison(groups=tuple(ordered), differing=differing, common=common)
    notes = _about_promises(found.promises) + _about_examples(ordered) + notes
    return Comparison(groups=found.groups, differing=differing, common=common, notes=tuple(notes))


def pareto(points: Iterable[tuple[float, float]]) -> list[bool]:
    """Of ``(epsilon, accuracy)``: whether no other has as little epsilon and as much accuracy, and is better in one.

    Epsilons within ``ALIKE`` of each other count as equal: calibration stops that near to its target.
    """
    known = list(points)
    return [
        not any(
            (e <= epsilon * (1 + ALIKE) and a > accuracy) or (e * (1 + ALIKE) < epsilon and a >= accuracy)
            for e, a in known
        )
        for epsilon, accuracy in known
    ]


def _described(run: Run) -> dict[str, str]:
    settings = {name: str(value) for name, value in run.config.settings().items() if name not in NOT_THE_METHOD}
    return {**settings, "objects": ", ".join(run.objects)}


def _group(settings: dict[str, str], usual: dict[str, str], runs: list[Run]) -> Group:
    accuracies = [100 * run.accuracy for run in runs if run.accuracy is not None]
    losses = [line["test_loss"] for run in runs for line in run.evaluated[-1:]]
    calibration = [run.quality["ece"] for run in runs if run.quality]
    return Group(
        label=_label(settings, usual, runs[0]),
        family=_label({k: v for k, v in settings.items() if k not in BUDGET}, usual, runs[0]),
        settings=settings,
        runs=tuple(runs),
        promise=Promise.of(runs[0]),
        accuracy=estimate(accuracies),
        loss=estimate(losses) if len(losses) == len(runs) else None,
        calibration=estimate(calibration) if len(calibration) == len(runs) else None,
        epsilon=max(run.epsilon for run in runs),
    )


def _label(settings: dict[str, str], usual: dict[str, str], run: Run) -> str:
    """The method and the settings that differ; of many only those that are not what most runs have."""
    hidden = set(NAMES[:1]) if "optimizer" in settings else set()
    if not run.config.private:
        hidden |= {"optimizer", "target_epsilon", "noise_multiplier"}
    if len(settings) > FEW_SETTINGS:
        hidden |= {name for name, value in settings.items() if value == usual[name]}
    words = [run.method] if "optimizer" in settings or "private" in settings or not settings else []
    for name, value in settings.items():
        if name not in hidden | {"private"} and value:
            words.append(_short(value) if name in NAMES else f"{name} {_short(value)}")
    return ", ".join(words) or run.method


def _short(value: str) -> str:
    try:
        return f"{float(value):g}"
    except ValueError:
        return Path(value).name


def _with_front(groups: list[Group]) -> list[Group]:
    found = []
    for kind in {(group.promise, group.measured_on): None for group in groups}:
        alike = [group for group in groups if (group.promise, group.measured_on) == kind]
        on_front = pareto((group.epsilon, group.accuracy.mean) for group in alike)
        found += [replace(group, on_front=on) for group, on in zip(alike, on_front, strict=True)]
    return found


def _about_examples(groups: Sequence[Group]) -> list[str]:
    kinds = sorted({group.measured_on for group in groups})
    if len(kinds) < 2:
        return []
    return [
        f"Accuracies are of different examples ({' / '.join(kind or 'unknown' for kind in kinds)}). Fronts are apart."
    ]


def _about_promises(promises: set[Promise]) -> list[str]:
    """A warning for each part of the promise that is not the same in all groups."""
    if len(promises) < 2:
        return []
    words = []
    for name, said in PROMISE_WORDS.items():
        values = sorted({str(getattr(promise, name)) for promise in promises})
        words += [f"{said} ({' / '.join(values)})"] if len(values) > 1 else []
    return [f"Epsilons are not comparable across these groups: they differ in {' and '.join(words)}. Fronts are apart."]
