"""One run of a sweep in its folder: shown if it is complete, gone on with if it was begun, else begun."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed_dpsat.errors import RunError
from fed_dpsat.flower.wire.compat import FLOWER_LOGGER
from fed_dpsat.lab.sweep.spec import Run
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.simulation import resume, simulate

ORPHAN_SECONDS = 60.0
"""How long a run waits for a worker of a sweep that was killed, which ends soon after it."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A run and its folder; ``fresh`` begins anew and puts aside what is there."""

    run: Run
    folder: Path
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """What ``summary.json`` says, and the seconds that getting it took, start included."""

    summary: dict[str, Any]
    wall_seconds: float


def execute(attempt: Attempt) -> Result:
    """Raises what ``simulate`` and ``resume`` raise, and ``RunError`` where another process is at this run.

    What the run logs goes into ``<folder>.log``. What clients keep between rounds is dropped at the end.
    """
    folder, started = attempt.folder, time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(folder.name + ".lock")), _logged(folder.with_name(folder.name + ".log")):
        if attempt.fresh and folder.exists():
            folder.rename(_unused(folder))
        begun = (folder / "config.toml").exists()
        summary = resume(folder) if begun else simulate(attempt.run.config, folder)
        shutil.rmtree(RunFolder(folder, resume=True).state_path, ignore_errors=True)
    return Result(summary=summary, wall_seconds=time.perf_counter() - started)


def completed(folder: Path) -> dict[str, Any]:
    """The summary of the run in ``folder``; empty if it is not complete.

    Raises ``SettingError`` where a complete one had other plug-ins or files than are there now: a table of both
    compares nothing. One that is not complete is begun anew with those that are there.
    """
    if not (folder / "config.toml").exists():
        return {}
    run = RunFolder(folder, resume=True)
    if (summary := run.summary()).get("status") != "completed":
        return {}
    run.check_files(setting="out", value=str(folder.parent.parent), again="name another folder with --out")
    return summary


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this process alone holds the lock ``path`` inside; it ends with the process, kill -9 included."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
    finally:
        os.close(descriptor)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + ORPHAN_SECONDS
    while True:
        with locked(path) as mine:
            if mine:
                yield
                return
        if time.monotonic() > deadline:
            raise RunError(f"another process is at the run of {path}; wait for its end")
        time.sleep(0.2)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Warnings of a run into a file that is made for the first, instead of among those of all others."""
    logger = logging.getLogger("fed_dpsat")
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    propagated, flower = logger.propagate, FLOWER_LOGGER.level
    logger.addHandler(handler)
    logger.propagate = False
    FLOWER_LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.propagate = propagated
        FLOWER_LOGGER.setLevel(flower)


def _unused(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.failed-{number}")).exists():
        number += 1
    return aside
