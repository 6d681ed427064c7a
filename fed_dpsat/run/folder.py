"""The folder of a run: all files that support its result, written while it runs.

================== ===========================================================================
file               content
================== ===========================================================================
config.toml        every setting, as resolved
environment.json   versions, machine and command
inputs.json        plug-in files, data and what else the run depends on, by SHA-256 (``fed_dpsat.run.inputs``)
inputs/            copies of plug-ins, of the user's modules that they import, and of ``client_table``
rounds.jsonl       one line per round, whole at any time; the same bits for the same seed
timing.jsonl       one line per round: seconds by phase, throughput, memory
ledger.sqlite      every charge, on disk before the message of the charge
checkpoint/        the model after the last round, and the state of the server
state/             the state that simulated clients keep between rounds
summary.json       the result
quality.json       the last evaluated model (summary: evaluated_on): calibration, accuracy by class
simulation.json    only in a simulation: label counts by client, unknown in a deployment
trace.json         the times of clients and phases, if ``profile`` is set
================== ===========================================================================

The checkpoint ends a round. A resumed run deletes the later lines of the two ``jsonl`` files and repeats the
interrupted round; the ledger keeps every charge.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from fed_dpsat.accounting import storage
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.client import protocol
from fed_dpsat.errors import RunError, SettingError, written
from fed_dpsat.params import Params
from fed_dpsat.run.extension import changed_settings, check_resumed, stored
from fed_dpsat.run.inputs import Input, changed, difference, refused
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.flat import read_toml
from fed_dpsat.step.noise import NOISE_SOURCES
from fed_dpsat.step.placement import described

log = getLogger("fed_dpsat")

BEGINNING = frozenset({"environment.json", "environment.json.tmp", "inputs.json", "inputs.json.tmp", "config.toml.tmp"})
"""Files of a run that was killed before it wrote ``config.toml``: it sent no message, and starts again."""
LEDGER = "ledger.sqlite"
OWN = (
    *("rounds.jsonl", "timing.jsonl", "summary.json", "quality.json", "simulation.json", "trace.json"),
    *("checkpoint", "state", "report.html", "figures", "sharpness.json", "loggers", "tensorboard", "wandb"),
    *(LEDGER, f"{LEDGER}-journal", f"{LEDGER}.new", f"{LEDGER}.lock", "inputs", "inputs.json"),
    *("inputs.json.tmp", "config.toml.tmp", "config.toml", "environment.json.tmp", "environment.json"),
)
"""What a run, its loggers and the commands that read it write, in the order in which ``prepare`` has it deleted: a
deletion that is interrupted leaves a folder that can be prepared again."""
PACKAGES = ("fed-dpsat", "torch", "torchvision", "flwr", "ray", "dp-accounting", "opacus", "numpy", "randomgen")
NUMERICS = ("torch", "numpy", "randomgen")
"""Packages that decide the bits of a run."""
EXTRAS = ("timm", "transformers", "peft")
"""Packages whose networks a run may train, if they are installed."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The model after ``round`` and plain data of the server; ``cannot_resume`` is the reason against a resume."""

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


def prepare(path: Path, overwrite: bool = False) -> list[Path]:
    """The files of an earlier run that a new run in ``path`` replaces; empty for a new or empty folder.

    A run in which nothing was trained (no round, no charge) is always replaced. With ``overwrite`` so is a run with
    seeded noise, and the charges in its ledger go with it: seeded noise protects nobody, so its account bounds no
    real release. Other files in the folder stay.

    Raises ``SettingError`` for a folder that holds anything else, for a run with secret noise, whose charges must be
    kept, and for a ledger that is a link to a file elsewhere; ``LedgerError`` if another process writes to the ledger.
    """
    found = [path / name for name in OWN if (path / name).is_symlink() or (path / name).exists()]
    others = path.exists() and any(one not in found and _holds_files(one) for one in _content(path))
    if not found and not others:
        return []
    ledger = path / LEDGER
    if _is_run(path) and ledger.exists():
        if ledger.is_symlink() or ledger.stat().st_nlink > 1:
            remedy = "other runs may use it: name another folder with --out"
            raise SettingError("out", str(path), f"a folder with a ledger of its own ({ledger} is a link)", remedy)
        with storage.lock(ledger):  # refuses while another process trains here
            pass
    if not others and (_only_begun(path) or (_is_run(path) and not _trained(path))):
        return found
    if not _is_run(path):
        raise SettingError("out", str(path), "new or empty", "name another folder with --out")
    if not overwrite:
        remedy = (
            f"name another folder with --out, continue that run: `fed-dpsat resume {path}`, or replace it: --overwrite "
            "(overwrite=True in Python)"
        )
        raise SettingError("out", str(path), "new or empty", remedy)
    source = read_toml(path / "config.toml").get("noise_source")
    if source not in NOISE_SOURCES or not NOISE_SOURCES[source].reproducible:
        remedy = "its charges must be kept; name another folder with --out, or delete it if nobody saw its models"
        raise SettingError("overwrite", True, f"possible for a run with noise_source={source!r} ({path})", remedy)
    return found


def how_to_continue(path: Path) -> str:
    """What is in ``path`` after a failure, and the command that continues the run."""
    if not (path / "config.toml").is_file():
        return "no client was asked, and nothing was written"
    folder = RunFolder(path, resume=True)
    trained = max((line["round"] for line in folder.rounds()), default=0)
    checkpoint = folder.load_checkpoint()
    if checkpoint and checkpoint.cannot_resume:
        return f"{path} has {trained} finished rounds; it cannot be resumed: {checkpoint.cannot_resume}"
    again = f"`fed-dpsat resume {path}`"
    if objects := folder.objects():
        again = f"simulate(RunConfig(..., resume=True), ...) with the same {', '.join(objects)}"
    return f"{path} has {trained} finished rounds; {again} continues"


def fresh(name: str) -> Path:
    """A folder for a new run, ``runs/NAME-TIME``, which does not exist."""
    base = f"runs/{re.sub(r'[^A-Za-z0-9_-]+', '-', name).strip('-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    tries = (Path(base + (f"-{number}" if number > 1 else "")) for number in itertools.count(1))
    return next(path for path in tries if not path.exists())


class RunFolder:
    """The files of one run under ``path``; with ``resume``, of an existing run.

    ``overwrite`` lets ``open`` replace an earlier run (``prepare``). Raises the errors of ``prepare``, and
    ``SettingError`` if ``path`` holds no run to ``resume`` or is not writable.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and not (path / "config.toml").is_file():
            raise SettingError(
                "out",
                str(path),
                "the folder of a run",
                "name a folder with config.toml; a run that was killed before it wrote that starts again: "
                "fed-dpsat run",
            )
        if not resume and not _may_be_written(path):
            raise SettingError("out", str(path), "a writable folder", "name another folder with --out")
        if not resume:
            prepare(path, overwrite)
        self.path, self.resumes, self._overwrite = path, resume, overwrite
        self.ledger_path, self.state_path, self.trace_path = path / LEDGER, path / "state", path / "trace.json"
        self.checkpoint_path = path / "checkpoint" / "model.pt"  # torch.load(..., weights_only=True) reads it

    def open(self, config: RunConfig, *, objects: Sequence[str] = (), inputs: Sequence[Input] = ()) -> None:
        """Create the folder and write its first files; ``objects`` names the arguments that are Python objects.

        Raises ``SettingError`` if a resumed run has another version, other settings or other ``inputs`` than before.
        """
        if self.resumes:
            self.check_version(setting="resume", value=True, again="start a new run")
            begun = self.config().with_absolute_paths()  # an older version left names of plug-ins as they were
            self.check_settings(config)
            if one := difference(self.inputs(), inputs):
                raise refused(one, self.path, setting="resume", value=True, again="start a new run")
            if changed_settings(begun, config):  # without a summary, a resume does not take the run for complete
                (self.path / "summary.json").unlink(missing_ok=True)
            if (now := stored(begun, config)) != begun:
                _write_atomically(self.path / "config.toml", now.to_toml())
            return
        watched = self.state_path.is_dir()  # workers that have started look for it
        self._replace()
        with written(self.checkpoint_path.parent):
            self.checkpoint_path.parent.mkdir(parents=True, exist_ok=True)
            if watched:
                self.state_path.mkdir(exist_ok=True)
        environment = {**surroundings(), "device": described(config.device), "objects": list(objects)}
        _write_atomically(self.path / "environment.json", _json(environment, indent=2) + "\n")
        _write_atomically(self.path / "inputs.json", _json([dataclasses.asdict(i) for i in inputs], indent=2) + "\n")
        for one in inputs:
            if one.copy:
                with written(copy := self.path / one.copy):
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(one.path, copy)
        settings = dataclasses.replace(config, out="", resume=False)
        _write_atomically(self.path / "config.toml", settings.to_toml())

    def _replace(self) -> None:
        """Delete the earlier run that this one replaces."""
        earlier = prepare(self.path, self._overwrite)
        if self.ledger_path in earlier and (charges := _charges(self.ledger_path)):
            log.warning("%s held another run, which is deleted with the %d charges in its ledger", self.path, charges)
        for one in earlier:
            with written(one):
                shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink(missing_ok=True)

    def check_version(self, *, setting: str, value: object, again: str) -> None:
        """Raise ``SettingError`` for a run of a version that computes other bits; warn of other ``NUMERICS``."""
        environment = json.loads((self.path / "environment.json").read_text())
        began = environment["packages"]
        said = {"version": began[protocol.PACKAGE], "protocol": environment.get("protocol")}
        if found := protocol.difference(said, f"{self.path} began with", "this is"):
            raise SettingError(setting, value, f"possible to the same bits: {found}", f"use that version, or {again}")
        now = versions()
        if others := [f"{name} {began[name]} (now {now[name]})" for name in NUMERICS if began[name] != now[name]]:
            log.warning("%s began with %s: later rounds can have other bits", self.path, ", ".join(others))

    def check_settings(self, now: RunConfig) -> None:
        """Raise ``SettingError`` unless the run in this folder can go on with the settings ``now``."""
        begun = self.config().with_absolute_paths()
        check_resumed(begun, now, str(self.path))
        if now.num_rounds == begun.num_rounds:
            return
        bound = f"possible for {self.path}, which began with num_rounds={begun.num_rounds}"
        if reason := self.summary().get("ended_early"):
            raise SettingError("num_rounds", now.num_rounds, bound, f"the run ended early: {reason}")
        saved = self.load_checkpoint()
        trained = saved is not None and saved.round > 0 and self.sizes() and "client_app" not in self.objects()
        if trained and not self.state_path.is_dir():
            why = "the states of its clients were deleted, as in a complete run of a sweep; start a new run"
            raise SettingError("num_rounds", now.num_rounds, bound, why)

    def config(self) -> RunConfig:
        """The settings of the run in this folder."""
        return RunConfig.from_mapping(read_toml(self.path / "config.toml"))

    def objects(self) -> list[str]:
        """Names of the arguments of the run that are Python objects, which its settings do not describe."""
        found: list[str] = json.loads((self.path / "environment.json").read_text())["objects"]
        return found

    def inputs(self) -> list[Input]:
        """The inputs of the run beside its settings. Raises ``SettingError`` for a run of an older version."""
        path = self.path / "inputs.json"
        if not path.exists():
            raise SettingError(
                "run",
                str(self.path),
                "a run with a list of its plug-ins and data (inputs.json)",
                "use the version that started it, or start a new run",
            )
        return [Input(**one) for one in json.loads(path.read_text())]

    def check_files(self, *, setting: str, value: object, again: str) -> None:
        """Raise ``SettingError`` if a plug-in or another input file has changed since the start of the run."""
        if one := changed(self.inputs()):
            raise refused(one, self.path, setting=setting, value=value, again=again)

    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``; empty before the end of the run."""
        path = self.path / "summary.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def rounds(self) -> list[dict[str, Any]]:
        """The complete lines of ``rounds.jsonl``, in order."""
        return self._lines("rounds.jsonl")

    def last_round(self) -> int:
        """The last complete line of ``rounds.jsonl``; 0 without one."""
        return max((int(line["round"]) for line in self.rounds()), default=0)

    def timing(self) -> list[dict[str, Any]]:
        """The complete lines of ``timing.jsonl``, in order."""
        return self._lines("timing.jsonl")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append_round(self, record: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Append one line to each of the two files, each in one write."""
        for name, line in (("timing.jsonl", timing), ("rounds.jsonl", record)):
            path = self.path / name
            with written(path), path.open("ab") as file:
                file.write((_json(line) + "\n").encode())

    def cut_off(self, after: int) -> None:
        """Delete the lines of rounds later than ``after``, and an incomplete last line."""
        for name in ("rounds.jsonl", "timing.jsonl"):
            path = self.path / name
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith("\n") and json.loads(line)["round"] <= after]
            _write_atomically(path, "".join(whole))

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint atomically; this ends the round."""
        temporary = self.checkpoint_path.with_suffix(".tmp")
        with written(self.checkpoint_path):
            try:
                with temporary.open("wb") as file:
                    torch.save({f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch hides it in an error of its own
                    raise error.__context__ from None
                raise
            os.replace(temporary, self.checkpoint_path)

    def load_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint; None before the first one. Raises ``RunError`` for a damaged file."""
        if not self.checkpoint_path.exists():
            return None
        try:
            return Checkpoint(**torch.load(self.checkpoint_path, weights_only=True))
        except Exception as error:  # torch raises many classes for a damaged file
            raise RunError(f"{self.checkpoint_path} is not a checkpoint of this version ({error})") from error

    def save_simulation(self, sizes: Sequence[int], label_counts: Sequence[Sequence[int]] | None) -> None:
        """Facts about clients that only a simulation knows; ``label_counts[client][class]`` is private."""
        _write_atomically(self.path / "simulation.json", _json({"sizes": sizes, "label_counts": label_counts}) + "\n")

    def sizes(self) -> list[int]:
        """Number of examples of each client of a simulation; empty for a deployment."""
        path = self.path / "simulation.json"
        found: list[int] = json.loads(path.read_text())["sizes"] if path.exists() else []
        return found

    def save_quality(self, quality: Mapping[str, Any]) -> None:
        """Write the quality of the last evaluated model."""
        _write_atomically(self.path / "quality.json", _json(quality, indent=2) + "\n")

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        _write_atomically(self.path / "summary.json", _json(summary, indent=2) + "\n")


def surroundings() -> dict[str, Any]:
    """Command, machine and versions of this process."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions(),
        "protocol": protocol.PROTOCOL,
    }


def jsonable(value: Any) -> Any:
    """``value`` for JSON: keys are text, inf becomes "inf" and NaN becomes "nan"."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(jsonable(value), indent=indent, allow_nan=False)


def _content(path: Path) -> Iterable[Path]:
    return path.iterdir() if path.is_dir() else [path]


def _holds_files(path: Path) -> bool:
    return not path.is_dir() or any(not one.is_dir() for one in path.rglob("*"))


def _is_run(path: Path) -> bool:
    """Whether ``path`` contains the settings and the environment of a run, and not only files with such names."""
    try:
        environment = json.loads((path / "environment.json").read_text())
    except (OSError, ValueError):
        return False
    of_run = isinstance(environment, dict) and "fed-dpsat" in environment.get("packages", ())
    return of_run and (path / "config.toml").is_file()


def _only_begun(path: Path) -> bool:
    """Whether ``path`` contains at most ``BEGINNING`` and empty folders."""
    copies = path / "inputs" if (path / "inputs.json").is_file() else None
    return all(f.name in BEGINNING or f.parent == copies for f in path.rglob("*") if f.is_file())


def _trained(path: Path) -> bool:
    """Whether the run in ``path`` has charged a client or recorded a round after the evaluation before the first."""
    lines = RunFolder(path, resume=True).rounds()
    if any(line["round"] > 0 for line in lines):
        return True
    return _charges(path / LEDGER) > 0 if (path / LEDGER).exists() else bool(lines)


def _charges(ledger: Path) -> int:
    with PrivacyLedger(ledger, readonly=True) as opened:
        return opened.head.charges


def _may_be_written(path: Path) -> bool:
    """Whether ``path``, or its nearest existing parent, is writable."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with written(path):
        temporary.write_text(text)
        os.replace(temporary, path)
