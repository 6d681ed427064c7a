"""Labels of the groups of a comparison: short, and different for groups that differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fed_dpsat.run.result import Run

NAMES = ("optimizer", "base_optimizer", "strategy", "dataset", "model")
"""Settings whose value needs no name in a label."""

METHOD = {"optimizer", "private"}
"""Settings that ``Run.method`` states."""

BUDGET = ("target_epsilon", "noise_multiplier", "delta")
"""Settings of the privacy budget."""

FEW_SETTINGS = 3
"""The label of a group has all differing settings if there are at most this many."""

BUNDLES = "bundles"
"""The key in ``Run.environment`` of ``{axis: (bundle, settings of the axis)}`` for the bundles of a sweep."""

Settings = Mapping[str, str]
Axes = Mapping[str, frozenset[str]]


def labels_of(groups: Sequence[Settings], runs: Sequence[Run], without: Collection[str] = ()) -> list[str]:
    """A label per group, from its differing settings and one of its ``runs``; ``without`` names settings to leave out.

    Groups with one label, although they differ, get the next kind: with the names of the bundles of a sweep; with
    the settings of the bundles; with all settings and their values in full.
    """
    axes = _differing_axes(runs)
    usual = {name: Counter(of[name] for of in groups).most_common(1)[0][0] for name in groups[0]}
    keys = [tuple(value for name, value in of.items() if name not in without) for of in groups]
    pairs = list(zip(groups, runs, strict=True))
    found = [_short_label(settings, run, usual, axes, without) for settings, run in pairs]
    for again in (
        [_short_label(settings, run, usual, {}, without) for settings, run in pairs],
        [_whole_label(settings, run, without) for settings, run in pairs],
    ):
        of_label: dict[str, set[object]] = {}
        for label, key in zip(found, keys, strict=True):
            of_label.setdefault(label, set()).add(key)
        found = [other if len(of_label[label]) > 1 else label for label, other in zip(found, again, strict=True)]
    return found


def _short_label(settings: Settings, run: Run, usual: Settings, axes: Axes, without: Collection[str]) -> str:
    """The bundles, or the method, and the differing settings; with many, only those without the most common value."""
    own = run.environment.get(BUNDLES, {})
    named = {axis: own[axis][0] for axis, covers in axes.items() if axis in own and not covers <= set(without)}
    covered = {name for axis in named for name in axes[axis]}
    hidden = METHOD | covered | set(without)
    if not run.config.private:
        hidden |= set(BUDGET[:2])
    if len(settings.keys() - covered) > FEW_SETTINGS:
        hidden |= {name for name, value in settings.items() if value == usual[name]}
    words = [run.method] if METHOD & settings.keys() - covered else []
    words += named.values()
    words += [
        _short(value) if name in NAMES else f"{name} {_short(value)}"
        for name, value in settings.items()
        if name not in hidden and value
    ]
    words = words or [_short(settings[name]) for name in NAMES if settings.get(name) and name not in without]
    return ", ".join(dict.fromkeys(words)) or run.method


def _whole_label(settings: Settings, run: Run, without: Collection[str]) -> str:
    return ", ".join([run.method, *(f"{name} {value}" for name, value in settings.items() if name not in without)])


def _differing_axes(runs: Sequence[Run]) -> Axes:
    """The axes on which not all ``runs`` have the same bundle, with the settings of all their bundles."""
    bundles = [run.environment.get(BUNDLES, {}) for run in runs]
    found: dict[str, frozenset[str]] = {}
    for axis in dict.fromkeys(axis for own in bundles for axis in own):
        there = [own[axis] for own in bundles if axis in own]
        if len(there) < len(runs) or len({name for name, _ in there}) > 1:
            found[axis] = frozenset(setting for _, covers in there for setting in covers)
    return found


def _short(value: str) -> str:
    """A number with few digits, a path without its folders, an object without its module."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return Path(value).name.rpartition(":")[2]
