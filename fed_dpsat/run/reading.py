"""A run folder as plain data, with a sentence for each missing file.

===================================== =========================================================================
case                                  what happens
===================================== =========================================================================
no folder, or no ``config.toml``      ``InputError``
a file with invalid JSON or TOML      ``InputError`` that names file and line
an incomplete last line (killed run)  left out; a sentence in ``missing``
no ``summary.json`` (killed, running) ``status`` is unfinished; figures use the existing rounds
no ``quality.json`` (older, failed)   a sentence in ``missing``
===================================== =========================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_dpsat.errors import InputError, RunError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.run.metric import LOSS
from fed_dpsat.run.result import Line, Run, main_metric
from fed_dpsat.run.statement import trusted_ledger
from fed_dpsat.settings.config import RunConfig


def load_run(path: str | Path) -> Run:
    """The run in the folder ``path``, whether complete or not: settings, rounds, model, ledger and summary.

    Raises ``InputError`` for a folder without a run, and for damaged files.
    """
    path = Path(path)
    if not (path / "config.toml").is_file():
        why = "it does not exist" if not path.is_dir() else "it has no config.toml"
        raise InputError(f"{path} is not a run folder: {why}; give a folder that `fed-dpsat run --out` wrote")
    try:
        config = RunFolder(path, resume=True).config()
    except InputError as error:
        raise InputError(f"{path / 'config.toml'} cannot be read: {error}") from None
    missing: list[str] = []
    summary = _object(path / "summary.json")
    keys = {"round", main_metric(config, summary or {}).key, LOSS.key, "epsilon"}
    rounds = _lines(path / "rounds.jsonl", keys, missing)
    timing = _lines(path / "timing.jsonl", {"round", "seconds", "phases"}, missing)
    if summary is None:
        missing.append("There is no summary.json: the run is still active, or was killed. Resume it to its end.")
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
        summary={"noise_distribution": config.noise_distribution, **summary} if summary else {},  # 0.1.0 knew one
        quality=quality,
        simulation=_object(path / "simulation.json"),
        sharpness=_object(path / "sharpness.json"),
        epsilon=_epsilon(path, config, summary),
        missing=tuple(missing),
    )


def _epsilon(path: Path, config: RunConfig, summary: Line | None) -> float:
    """Epsilon of the summary of a complete run; else of the ledger, which a later resume may have extended."""
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
        raise InputError(f"{path} is damaged ({error}); restore it, or remove it to continue without it") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged (no JSON object); restore it, or remove it to continue without it")
    return _numbers(found)


def _lines(path: Path, keys: set[str], missing: list[str]) -> list[Line]:
    if not path.exists():
        missing.append(f"There is no {path.name}: no round is complete.")
        return []
    try:
        texts = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it from a backup") from None
    found = []
    for number, text in enumerate(texts, 1):
        if not text.endswith("\n"):
            missing.append(f"The last line of {path.name} is incomplete, and is left out.")
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
    """``values`` with "inf", "-inf" and "nan" as numbers, and with clients as keys that are numbers."""
    back = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
    found: dict[Any, Any] = {
        int(key) if key.isdecimal() else key: _numbers(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }
    return {key: back.get(value, value) if isinstance(value, str) else value for key, value in found.items()}
