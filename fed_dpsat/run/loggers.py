"""The protocol of a logger, and all loggers of a run behind one object.

A logger runs in the process of the server and receives only the content of the run folder: the configuration, the lines
of ``rounds.jsonl`` and ``timing.jsonl``, and the summary. It receives no other result of a client.
``fed_dpsat.lab.loggers`` holds the built-in loggers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

from fed_dpsat import plugins
from fed_dpsat.errors import InputError, RunError, written
from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import RunConfig

log = getLogger("fed_dpsat")

METHODS = ("begin", "round", "end")


class RunLogger(Protocol):
    """Receives a run in three calls, each with a copy of the data.

    Files of the run folder are those of the call: in ``round``, ``checkpoint/model.pt`` is the model after that round.
    After a kill, the resumed run repeats a call of ``round`` that had not returned: a round may come twice, and none is
    left out.

    An exception of ``begin`` ends the run before the first message to a client. After an exception of another method
    the run logs one warning and continues without the logger.
    """

    def begin(self, config: RunConfig, folder: Path, next_round: int) -> None:
        """The run in ``folder`` starts or resumes; ``next_round`` comes first, 0 in a new run: an evaluation."""

    def round(self, record: Mapping[str, Any]) -> None:
        """A line of ``rounds.jsonl``; its key ``timing`` holds the line of ``timing.jsonl``."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """The content of ``summary.json``; ``status`` says whether the run is complete."""


class Loggers:
    """Loggers by name; a logger that raises after ``begin`` causes one warning and is removed."""

    def __init__(self, loggers: Mapping[str, RunLogger]) -> None:
        self._loggers = dict(loggers)

    @classmethod
    def of(cls, config: RunConfig) -> Loggers:
        """The loggers that ``config.loggers`` names; raises ``PluginError`` for a missing logger or package."""
        names = [name.strip() for name in config.loggers.split(",") if name.strip()]
        return cls({name: _build(name, config) for name in names})

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def begin(self, config: RunConfig, folder: Path, done: int) -> int:
        """Start all loggers of a run with ``done`` rounds, -1 before round 0; returns the round to send first.

        That is a round before ``done`` if a kill came between its checkpoint and the end of its call. Raises
        ``RunError`` if a logger cannot start, before the first message to a client.
        """
        self._sent = folder / "loggers" / "last-round"
        next_round = 1 + (min(done, int(self._sent.read_text())) if self._sent.exists() else done)
        for name, logger in self._loggers.items():
            try:
                logger.begin(config, folder, next_round)
            except InputError:
                raise
            except Exception as error:
                raise RunError(
                    f"loggers={name!r} cannot start ({type(error).__name__}: {error}); repair it, or continue without: "
                    f"fed-dpsat resume {folder} --set loggers="
                ) from error
        self._note(next_round - 1)
        return next_round

    def round(self, record: Mapping[str, Any]) -> None:
        """Send one round, whose checkpoint is on disk, to all loggers."""
        self._tell(lambda logger: logger.round(copy.deepcopy(record)), f"round {record['round']}")
        self._note(record["round"])

    def end(self, summary: Mapping[str, Any]) -> None:
        """Send the summary to all loggers."""
        self._tell(lambda logger: logger.end(copy.deepcopy(summary)), "the end")

    def _note(self, round: int) -> None:
        """Write the last round that all loggers have received."""
        temporary = self._sent.with_suffix(".tmp")
        with written(self._sent):
            temporary.parent.mkdir(exist_ok=True)
            temporary.write_text(str(round))
            os.replace(temporary, self._sent)

    def _tell(self, tell: Callable[[RunLogger], None], of: str) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                tell(logger)
            except Exception as error:
                del self._loggers[name]
                log.warning(
                    "loggers: %s failed at %s (%s: %s) and is removed; the run folder has all data",
                    name,
                    of,
                    type(error).__name__,
                    error,
                )


def _build(name: str, config: RunConfig) -> RunLogger:
    logger: RunLogger = plugins.build("logger", name, config.settings())
    if missing := [method for method in METHODS if not callable(getattr(logger, method, None))]:
        raise PluginError(f"loggers={name!r} made a {type(logger).__name__} without {missing[0]}(); it needs {METHODS}")
    return logger
