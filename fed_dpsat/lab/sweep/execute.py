"""One run of a sweep in its folder: return it if complete, resume it if incomplete, else start it."""

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
from fed_dpsat.flower.wire.compat import at_level
from fed_dpsat.lab.sweep.spec import Run
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.simulation import resume, simulate

ORPHAN_SECONDS = 60.0
"""Seconds that a run waits for the worker of a killed sweep, which ends soon after it."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A run and its folder; ``fresh`` renames an existing folder and starts again."""

    run: Run
    folder: Path
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """The content of ``summary.json``, and the seconds of the run including its start."""

    summary: dict[str, Any]
    wall_seconds: float


def execute(attempt: Attempt) -> Result:
    """Execute a run; its warnings go into ``<folder>.log``, and its client states are deleted at the end.

    Raises the errors of ``simulate`` and ``resume``, and ``RunError`` if another process executes the run.
    """
    folder, started = attempt.folder, time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(folder.name + ".lock")), _logged(folder.with_name(folder.name + ".log")):
        if attempt.fresh and folder.exists():
            folder.rename(_unused(folder))
        begun = (folder / "config.toml").exists()
        run = resume(folder, progress=False) if begun else simulate(attempt.run.config, folder, progress=False)
        shutil.rmtree(RunFolder(folder, resume=True).state_path, ignore_errors=True)
    return Result(summary=run.summary, wall_seconds=time.perf_counter() - started)


def completed(folder: Path) -> dict[str, Any]:
    """The summary of the run in ``folder``; empty if it is not complete.

    Raises ``SettingError`` if the version of this project, a plug-in or an input file of a complete run has changed
    since: its result would not be comparable. An incomplete run starts again with the new files.
    """
    if not (folder / "config.toml").exists():
        return {}
    run = RunFolder(folder, resume=True)
    if (summary := run.summary()).get("status") != "completed":
        return {}
    out, again = str(folder.parent.parent), "name another folder with --out"
    run.check_version(setting="out", value=out, again=again)
    run.check_files(setting="out", value=out, again=again)
    return summary


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock ``path`` during the block; yields False if another process has the lock, which ends with that process."""
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
            raise RunError(f"another process executes the run of {path}; wait for its end")
        time.sleep(0.2)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Write the warnings of a run into a file of its own, created for the first warning."""
    logger = logging.getLogger("fed_dpsat")
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    propagated = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with at_level(logging.ERROR):
            yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.propagate = propagated


def _unused(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.failed-{number}")).exists():
        number += 1
    return aside
