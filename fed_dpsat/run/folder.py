"""A run is a folder: everything a reader needs to believe the number is in it, written as the run goes.

================== ===========================================================================
file               content
================== ===========================================================================
config.toml        every setting, as resolved
environment.json   versions, machine and command
inputs.json        plug-in files, data and what else the run depends on, by SHA-256 (``fed_dpsat.run.inputs``)
inputs/            copies of plug-ins, of modules of one's own that they import, and of ``client_table``
rounds.jsonl       one line per round, whole at any time; the same bits for the same seed
timing.jsonl       one line per round: seconds by phase, throughput, memory
ledger.sqlite      every charge, durable before the message that it pays for
checkpoint/        the model after the last round, and what the server has learned
state/             what simulated clients keep between rounds
summary.json       how it ended
quality.json       the last evaluated model (summary: evaluated_on): calibration, accuracy by class
simulation.json    of a simulation alone: who holds how many examples of which class, which no deployment knows
trace.json         who was at work when, if ``profile`` asked for it
================== ===========================================================================

A round is over when its checkpoint is there. What a killed run had begun beyond it is cut off the two ``jsonl`` files
when it is resumed, and done again; the ledger forgets nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fed_dpsat.errors import RunError, SettingError, written
from fed_dpsat.params import Params
from fed_dpsat.run.inputs import Input, changed, difference, refused
from fed_dpsat.settings.config import MACHINE, RunConfig
from fed_dpsat.step.placement import described

BEGINNING = frozenset({"environment.json", "environment.json.tmp", "inputs.json", "inputs.json.tmp", "config.toml.tmp"})
"""What a run that was killed before ``config.toml`` was there leaves: it had asked nobody, and starts again."""
PACKAGES = ("fed-dpsat", "torch", "torchvision", "flwr", "ray", "dp-accounting", "opacus", "numpy", "randomgen")
EXTRAS = ("timm", "transformers", "peft")
"""Packages whose networks a run may train, if they are installed."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The model after ``round``, and plain data of the server's; ``cannot_resume`` says why it is not enough."""

    round: int
    params: Params
    server: Mapping[str, Any]
    cannot_resume: str = ""


def versions() -> dict[str, str]:
    """Versions of ``PACKAGES``, and of those ``EXTRAS`` that are installed."""
    found = {name: version(name) for name in PACKAGES}
    for name in EXTRAS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class RunFolder:
    """The files of one run under ``path``; with ``resume`` of one that was begun.

    Raises ``SettingError`` if something else is there already, nothing to ``resume``, or no way to write.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        if resume and not (path / "config.toml").is_file():
            raise SettingError(
                "out",
                str(path),
                "the folder of a run",
                "name the one to resume; one that was killed before config.toml was there starts again: fed-dpsat run",
            )
        if not resume and path.exists() and (not path.is_dir() or _is_precious(path)):
            raise SettingError(
                "out", str(path), "a new or an empty folder", "name another with --out, or `fed-dpsat resume` that run"
            )
        if not resume and not _may_be_written(path):
            raise SettingError("out", str(path), "where files can be written", "name another folder with --out")
        self.path = path
        self.resumes = resume

    @property
    def ledger_path(self) -> Path:
        """Where the ledger lies."""
        return self.path / "ledger.sqlite"

    @property
    def checkpoint_path(self) -> Path:
        """Where the model lies; ``torch.load(..., weights_only=True)`` reads it."""
        return self.path / "checkpoint" / "model.pt"

    @property
    def state_path(self) -> Path:
        """Where the states of simulated clients lie."""
        return self.path / "state"

    @property
    def trace_path(self) -> Path:
        """Where a trace goes."""
        return self.path / "trace.json"

    def open(self, config: RunConfig, *, objects: Sequence[str] = (), inputs: Sequence[Input] = ()) -> None:
        """Create the folder and say what runs in it; ``objects`` were given in Python and are not named in ``config``.

        Raises ``SettingError`` where a run is resumed under settings or with ``inputs`` that would make it another run.
        """
        if self.resumes:
            begun = self.config()
            now = config.settings()
            if differ := [k for k, v in begun.settings().items() if v != now[k] and k not in MACHINE]:
                raise SettingError(
                    "resume", True, f"possible with other settings ({', '.join(differ)})", "start a new run"
                )
            if one := difference(self.inputs(), inputs):
                raise refused(one, self.path, setting="resume", value=True, again="start a new run")
            return
        with written(self.checkpoint_path.parent):
            self.checkpoint_path.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "device": described(config.device),
            "packages": versions(),
            "objects": list(objects),
        }
        _write_atomically(self.path / "environment.json", _json(environment, indent=2) + "\n")
        _write_atomically(self.path / "inputs.json", _json([dataclasses.asdict(i) for i in inputs], indent=2) + "\n")
        for one in inputs:
            if one.copy:
                with written(copy := self.path / one.copy):
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(one.path, copy)
        settings = dataclasses.replace(config, out="", resume=False)
        _write_atomically(self.path / "config.toml", settings.to_toml())

    def config(self) -> RunConfig:
        """The settings of the run in this folder."""
        return RunConfig.load(self.path / "config.toml")

    def objects(self) -> list[str]:
        """What was given to the run in Python, so that its settings alone do not describe it."""
        found: list[str] = json.loads((self.path / "environment.json").read_text())["objects"]
        return found

    def inputs(self) -> list[Input]:
        """What the run depends on beside its settings. Raises ``SettingError`` for a run of an older version."""
        path = self.path / "inputs.json"
        if not path.exists():
            raise SettingError(
                "run",
                str(self.path),
                "of a version that wrote down its plug-ins and data (inputs.json)",
                "go on with the version that began it, or start a new run",
            )
        return [Input(**one) for one in json.loads(path.read_text())]

    def check_files(self, *, setting: str, value: object, again: str) -> None:
        """Raise ``SettingError`` for a plug-in or another file that was changed since the run began."""
        if one := changed(self.inputs()):
            raise refused(one, self.path, setting=setting, value=value, again=again)

    def summary(self) -> dict[str, Any]:
        """How it ended; empty if it did not come so far."""
        path = self.path / "summary.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of ``rounds.jsonl`` that are whole, in order."""
        path = self.path / "rounds.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append_round(self, record: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """One line each, in one write."""
        for name, line in (("timing.jsonl", timing), ("rounds.jsonl", record)):
            path = self.path / name
            with written(path), path.open("ab") as file:
                file.write((_json(line) + "\n").encode())

    def cut_off(self, after: int) -> None:
        """Leave of rounds and timing what is of rounds up to ``after``; a line that was cut short goes too."""
        for name in ("rounds.jsonl", "timing.jsonl"):
            path = self.path / name
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith("\n") and json.loads(line)["round"] <= after]
            _write_atomically(path, "".join(whole))

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """In the place of the one before; the round is over when this returns."""
        temporary = self.checkpoint_path.with_suffix(".tmp")
        with written(self.checkpoint_path):
            try:
                with temporary.open("wb") as file:
                    torch.save({f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # which torch has made into words of its own
                    raise error.__context__ from None
                raise
            os.replace(temporary, self.checkpoint_path)

    def load_checkpoint(self) -> Checkpoint | None:
        """The one that was saved last; None if the run did not come so far. Raises ``RunError`` for a damaged one."""
        if not self.checkpoint_path.exists():
            return None
        try:
            return Checkpoint(**torch.load(self.checkpoint_path, weights_only=True))
        except Exception as error:  # whatever torch says of a file that is none
            raise RunError(f"{self.checkpoint_path} is no checkpoint of this version ({error})") from error

    def save_simulation(self, sizes: Sequence[int], label_counts: Sequence[Sequence[int]] | None) -> None:
        """What only a simulation knows of its clients; ``label_counts[client][class]`` is private to each of them."""
        _write_atomically(self.path / "simulation.json", _json({"sizes": sizes, "label_counts": label_counts}) + "\n")

    def sizes(self) -> list[int]:
        """How many examples each client of a simulation has; empty if this was none."""
        path = self.path / "simulation.json"
        found: list[int] = json.loads(path.read_text())["sizes"] if path.exists() else []
        return found

    def save_quality(self, quality: Mapping[str, Any]) -> None:
        """Of the model that was evaluated last."""
        _write_atomically(self.path / "quality.json", _json(quality, indent=2) + "\n")

    def close(self, summary: Mapping[str, Any]) -> None:
        """How it ended."""
        _write_atomically(self.path / "summary.json", _json(summary, indent=2) + "\n")


def jsonable(value: Any) -> Any:
    """``value`` with what JSON cannot hold as text: inf is "inf", NaN is "nan"."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(jsonable(value), indent=indent, allow_nan=False)


def _is_precious(path: Path) -> bool:
    """Whether a file in ``path`` or below it is another than those of a beginning."""
    copies = path / "inputs" if (path / "inputs.json").is_file() else None
    return any(f.is_file() and f.name not in BEGINNING and f.parent != copies for f in path.rglob("*"))


def _may_be_written(path: Path) -> bool:
    """``path``, or where it would be made."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with written(path):
        temporary.write_text(text)
        os.replace(temporary, path)
