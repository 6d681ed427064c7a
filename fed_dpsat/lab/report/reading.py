"""A run folder as plain data, and in words what is not there.

===================================== =========================================================================
case                                  what happens
===================================== =========================================================================
no folder, or no ``config.toml``      ``InputError``
a file that is no JSON or TOML        ``InputError`` that names file and line
last line cut short (a killed run)    left out, and said in ``missing``
no ``summary.json`` (killed, running) ``status`` says so; figures come from the rounds that are there
no ``quality.json`` (older, failed)   said in ``missing``
===================================== =========================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed_dpsat.client.given import FROM_PYTHON
from fed_dpsat.errors import InputError, RunError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.run.statement import trusted_ledger
from fed_dpsat.settings.config import RunConfig

Line = dict[str, Any]
UNFINISHED = "unfinished"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left behind; ``missing`` has a sentence for each thing that is not there.

    ``epsilon`` is the maximum over clients: the summary's, else the ledger's, which has charges of a round that did not
    end too; NaN where there is neither.
    """

    path: Path
    config: RunConfig
    environment: Line
    rounds: tuple[Line, ...]
    timing: tuple[Line, ...]
    summary: Line
    quality: Line | None
    simulation: Line | None
    sharpness: Line | None
    epsilon: float
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.path.resolve().name

    @property
    def status(self) -> str:
        """completed, interrupted, failed; or unfinished, where nobody came to say."""
        return str(self.summary.get("status", UNFINISHED))

    @property
    def evaluated(self) -> list[Line]:
        """Rounds after which the model was tested."""
        return [line for line in self.rounds if line["test_accuracy"] is not None]

    @property
    def objects(self) -> list[str]:
        """What came from Python, so that the settings alone do not describe the run."""
        return list(self.environment.get("objects", []))

    @property
    def accuracy(self) -> float | None:
        """Of the last evaluated model."""
        return float(self.evaluated[-1]["test_accuracy"]) if self.evaluated else None

    @property
    def num_test(self) -> int | None:
        """Test examples behind an accuracy, if the run says."""
        return int(self.quality["num_examples"]) if self.quality else None

    @property
    def method(self) -> str:
        """The optimizer, or that there was no noise."""
        if not self.config.private:
            return "without privacy"
        name = self.config.optimizer
        older = "optimizer" in self.objects and not name.endswith(FROM_PYTHON)  # said what it was not
        return "an optimizer from Python" if older else name


def read_run(path: Path) -> Run:
    """The run in the folder ``path``; raises ``InputError`` for what is none, or is damaged."""
    if not (path / "config.toml").is_file():
        why = "there is no such folder" if not path.is_dir() else "it has no config.toml"
        raise InputError(f"{path} is no run folder: {why}; give the one that `fed-dpsat run --out` named")
    try:
        config = RunConfig.load(path / "config.toml")
    except InputError as error:
        raise InputError(f"{path / 'config.toml'} cannot be read: {error}") from None
    missing: list[str] = []
    rounds = _lines(path / "rounds.jsonl", {"round", "test_accuracy", "test_loss", "epsilon"}, missing)
    timing = _lines(path / "timing.jsonl", {"round", "seconds", "phases"}, missing)
    summary = _object(path / "summary.json")
    if summary is None:
        missing.append("There is no summary.json: the run is still going on, or was killed. Resume it to its end.")
    quality = _object(path / "quality.json")
    if quality is None:
        missing.append("There is no quality.json: no model was evaluated, or an older version ran.")
    environment = _object(path / "environment.json")
    if environment is None:
        missing.append("There is no environment.json: versions and command are unknown.")
    return Run(
        path=path,
        config=config,
        environment=environment or {},
        rounds=tuple(rounds),
        timing=tuple(timing),
        summary=summary or {},
        quality=quality,
        simulation=_object(path / "simulation.json"),
        sharpness=_object(path / "sharpness.json"),
        epsilon=_epsilon(path, config, summary),
        missing=tuple(missing),
    )


def _epsilon(path: Path, config: RunConfig, summary: Line | None) -> float:
    """Of the summary, but for a run that may have gone on since it was written: its ledger knows."""
    folder, written = RunFolder(path, resume=True), float((summary or {}).get("epsilon", math.nan))
    if (summary or {}).get("status") == "completed" or not folder.ledger_path.exists():
        return written
    try:
        with trusted_ledger(folder) as ledger:
            return ledger.epsilon(config.delta, config.accountant)
    except RunError as error:
        raise InputError(str(error)) from None


def _object(path: Path) -> Line | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or remove it to do without") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged (no JSON object); restore it, or remove it to do without")
    return _numbers(found)


def _lines(path: Path, keys: set[str], missing: list[str]) -> list[Line]:
    if not path.exists():
        missing.append(f"There is no {path.name}: no round came to its end.")
        return []
    try:
        texts = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it from a backup") from None
    found = []
    for number, text in enumerate(texts, 1):
        if not text.endswith("\n"):
            missing.append(f"The last line of {path.name} was cut short, and is left out.")
            break
        try:
            line = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is damaged ({error}); restore it from a backup") from None
        if not isinstance(line, dict) or not keys <= line.keys():
            raise InputError(f"{path}, line {number} is damaged (not {', '.join(sorted(keys))}); restore it")
        found.append(_numbers(line))
    return found


def _numbers(values: Mapping[str, Any]) -> Line:
    """What JSON cannot hold, back from its text: "inf" is infinity."""
    back = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
    return {
        key: back.get(value, value) if isinstance(value, str) else _numbers(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }
