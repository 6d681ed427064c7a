"""What a sweep runs: cells, what is tuned in each, and the configuration of every run."""

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
"""Label to the settings that it stands for."""

DEFAULTS: dict[str, Any] = {spec.name: spec.default for spec in dataclasses.fields(RunConfig)}
"""Every setting of a run with its default."""

KNOWN = tuple(DEFAULTS)


class SweepError(InputError):
    """A sweep's file that asks for something impossible; nothing was run."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of the grid's axes but ``seed``: its label on each, all its settings, and what to tune."""

    labels: Mapping[str, str]
    settings: Settings
    tune: Mapping[str, Sequence[Scalar]]

    @property
    def name(self) -> str:
        """For a reader and a folder."""
        return "-".join(label if axis not in KNOWN else f"{axis}={label}" for axis, label in self.labels.items())

    @property
    def key(self) -> tuple[str, ...]:
        """Which cell of a sweep it is."""
        return tuple(self.labels.values())

    def candidates(self) -> list[Settings]:
        """Every combination of what is tuned; one empty one where nothing is."""
        return [dict(zip(self.tune, values, strict=True)) for values in itertools.product(*self.tune.values())]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep: of which cell, with which tuned settings and seed, and in which folder of it."""

    stage: str
    cell: Cell
    tuned: Settings
    config: RunConfig

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def name(self) -> str:
        """For a reader; with the digest, the name of its folder."""
        tuned = [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.tuned.items()
        ]
        return "-".join(part for part in (self.stage, self.cell.name, *tuned, f"seed={self.seed}") if part)

    @property
    def folder_name(self) -> str:
        """The same for the same settings, whatever else is in the sweep: so what is complete is found again."""
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
        """Settings that are searched, for any cell."""
        return list(dict.fromkeys([*self.tune, *(key for table in self.tune_of.values() for key in table)]))

    @property
    def settings(self) -> list[str]:
        """Settings that an axis or the tuning varies, in order."""
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
                        raise SweepError(f"{key} is set by grid.{source[key]} and by grid.{axis}; leave it to one")
                    settings[key], source[key] = value, axis
            tune = dict(self.tune)
            for label in labels:
                tune |= self.tune_of.get(label, {})
            if both := [key for key in tune if key in source]:
                raise SweepError(f"{both[0]} is tuned, and set by grid.{source[both[0]]}; leave it to one")
            found.append(Cell(labels=named, settings=settings, tune=tune))
        return found

    def tune_runs(self, cell: Cell) -> list[Run]:
        """On validation examples: every candidate with every seed of the tuning; none where nothing is tuned."""
        if not cell.tune:
            return []
        return [
            self._run("tune", cell, tuned, seed=seed, validation_share=self.validation_share)
            for tuned in cell.candidates()
            for seed in self.tune_seeds
        ]

    def final_runs(self, cell: Cell, tuned: Settings) -> list[Run]:
        """On all training examples and the test split: every seed of the grid with what was chosen."""
        return [self._run("final", cell, tuned, seed=seed) for seed in self.seeds]

    def check(self) -> None:
        """Make every run's configuration, so that a mistake in the last one is found before the first is run."""
        seen: dict[RunConfig, str] = {}
        for cell in self.cells():
            for run in [*self.tune_runs(cell), *self.final_runs(cell, cell.candidates()[0])]:
                if run.config in seen:
                    raise SweepError(f"{run.name} and {seen[run.config]} are the same run; take one out")
                seen[run.config] = run.name

    def digest(self) -> str:
        """Changes with anything that is asked for."""
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
    """Eight hex digits of what makes it another run: settings that are not their defaults, but for the machine's."""
    differ = {k: v for k, v in config.settings().items() if k not in MACHINE and v != DEFAULTS[k]}
    return hashlib.sha256(json.dumps(differ, sort_keys=True).encode()).hexdigest()[:8]
