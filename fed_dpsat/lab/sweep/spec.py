"""The content of a sweep: its cells, the settings to tune in each, and the configuration of every run."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fed_dpsat.errors import InputError, SettingError
from fed_dpsat.settings.config import MACHINE, RunConfig
from fed_dpsat.settings.values import Scalar

Settings = Mapping[str, Scalar]
Axis = Mapping[str, Settings]
"""Settings by label."""

DEFAULTS: dict[str, Any] = {spec.name: spec.default for spec in dataclasses.fields(RunConfig)}
"""Every setting of a run with its default."""

KNOWN = tuple(DEFAULTS)


class SweepError(InputError):
    """The file of a sweep is invalid; no run has started."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of the axes except ``seed``: its labels, all its settings, and the settings to tune."""

    labels: Mapping[str, str]
    settings: Settings
    tune: Mapping[str, Sequence[Scalar]]

    @property
    def name(self) -> str:
        """Its name, for readers and folders."""
        return "-".join(label if axis not in KNOWN else f"{axis}={label}" for axis, label in self.labels.items())

    @property
    def key(self) -> tuple[str, ...]:
        """Its identity in the sweep."""
        return tuple(self.labels.values())

    def candidates(self) -> list[Settings]:
        """Every combination of the tuned settings; without them, one empty candidate."""
        return [dict(zip(self.tune, values, strict=True)) for values in itertools.product(*self.tune.values())]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep: its stage, cell, tuned settings and configuration."""

    stage: str
    cell: Cell
    tuned: Settings
    config: RunConfig

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def name(self) -> str:
        """Its name for readers; with the digest, the name of its folder."""
        tuned = [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.tuned.items()
        ]
        return "-".join(part for part in (self.stage, self.cell.name, *tuned, f"seed={self.seed}") if part)

    @property
    def folder_name(self) -> str:
        """A function of its settings alone, so that a changed sweep finds its complete runs."""
        plain = re.sub(r"[^\w.=+-]+", "_", self.name)[:120]
        return f"{plain}-{digest(self.config)}"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A sweep. ``rounds_share`` below 1 cuts ``num_rounds`` of every run, for a budget."""

    base: Settings
    axes: Mapping[str, Axis]
    seeds: tuple[int, ...]
    tune: Mapping[str, Sequence[Scalar]] = field(default_factory=dict)
    tune_of: Mapping[str, Mapping[str, Sequence[Scalar]]] = field(default_factory=dict)
    tune_seeds: tuple[int, ...] = ()
    validation_share: float = 0.0
    rounds_share: float = 1.0

    @property
    def tuned(self) -> list[str]:
        """The settings that any cell tunes."""
        return list(dict.fromkeys([*self.tune, *(key for table in self.tune_of.values() for key in table)]))

    @property
    def settings(self) -> list[str]:
        """The settings that an axis or the tuning varies, in order."""
        found = [key for axis in self.axes.values() for bundle in axis.values() for key in bundle]
        return list(dict.fromkeys([*found, *self.tuned]))

    def cells(self) -> list[Cell]:
        """Every combination of the axes, the first axis slowest."""
        found = []
        for labels in itertools.product(*self.axes.values()):
            named = dict(zip(self.axes, labels, strict=True))
            settings, source = dict(self.base), dict[str, str]()
            for axis, label in named.items():
                for key, value in self.axes[axis][label].items():
                    if key in source:
                        raise SweepError(f"{key} is set by grid.{source[key]} and by grid.{axis}; set it in one")
                    settings[key], source[key] = value, axis
            tune = dict(self.tune)
            for label in labels:
                tune |= self.tune_of.get(label, {})
            if both := [key for key in tune if key in source]:
                raise SweepError(f"{both[0]} is tuned, and set by grid.{source[both[0]]}; set it in one")
            found.append(Cell(labels=named, settings=settings, tune=tune))
        return found

    def tune_runs(self, cell: Cell) -> list[Run]:
        """Runs on validation examples: every candidate with every seed of the tuning; empty without tuning."""
        if not cell.tune:
            return []
        return [
            self._run("tune", cell, tuned, seed=seed, validation_share=self.validation_share)
            for tuned in cell.candidates()
            for seed in self.tune_seeds
        ]

    def final_runs(self, cell: Cell, tuned: Settings) -> list[Run]:
        """Runs on all training examples and the test split: every seed of the grid with the settings ``tuned``."""
        return [self._run("final", cell, tuned, seed=seed) for seed in self.seeds]

    def check(self) -> None:
        """Make the configuration of every run, to find a mistake in the last one before the first one runs."""
        seen: dict[RunConfig, str] = {}
        for cell in self.cells():
            for run in [*self.tune_runs(cell), *self.final_runs(cell, cell.candidates()[0])]:
                if run.config in seen:
                    raise SweepError(f"{run.name} and {seen[run.config]} are the same run; remove one")
                seen[run.config] = run.name

    def digest(self) -> str:
        """A hash of the whole sweep."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def _run(self, stage: str, cell: Cell, tuned: Settings, **more: Scalar) -> Run:
        values = {**cell.settings, **tuned, **more, "workers": 0, "ray_address": "", "gpus_per_worker": 0.0}
        try:
            config = RunConfig.from_mapping(values).with_absolute_paths()
        except SettingError as error:
            raise SweepError(f"{cell.name or 'the only cell'}: {error}") from None
        rounds = max(1, int(config.num_rounds * self.rounds_share))
        config = dataclasses.replace(config, num_rounds=rounds)
        return Run(stage=stage, cell=cell, tuned=tuned, config=config)


def digest(config: RunConfig) -> str:
    """Eight hex digits of the settings that differ from their defaults, without those of the machine."""
    differ = {k: v for k, v in config.settings().items() if k not in MACHINE and v != DEFAULTS[k]}
    return hashlib.sha256(json.dumps(differ, sort_keys=True).encode()).hexdigest()[:8]
