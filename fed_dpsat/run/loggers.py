"""What a logger is, and all loggers of a run as one, of which none can end or delay it for good.

A logger runs beside the server and gets what the run folder holds, no more: the configuration, the lines of
``rounds.jsonl`` and ``timing.jsonl``, the summary. Nothing that a client computed on its data reaches it but through
them. Built-in ones are in ``fed_dpsat.lab.loggers``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

from fed_dpsat import plugins
from fed_dpsat.errors import InputError, RunError
from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import RunConfig

log = getLogger("fed_dpsat")

METHODS = ("begin", "round", "end")


class RunLogger(Protocol):
    """Told of a run by three calls; a copy each, so that it can change nothing.

    What ``begin`` raises ends the run before a client is asked. What the others raise is said once, and the run goes
    on without the logger.
    """

    def begin(self, config: RunConfig, folder: Path, next_round: int) -> None:
        """The run in ``folder`` begins, or goes on, with ``next_round``: 0 in a new one, its first evaluation."""

    def round(self, record: Mapping[str, Any]) -> None:
        """A line of ``rounds.jsonl`` and under ``timing`` one of ``timing.jsonl``, as JSON holds them."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """What ``summary.json`` holds; ``status`` says whether the run is complete."""


class Loggers:
    """Loggers by name; one that raises after ``begin`` is warned of once and left out from then on."""

    def __init__(self, loggers: Mapping[str, RunLogger]) -> None:
        self._loggers = dict(loggers)

    @classmethod
    def of(cls, config: RunConfig) -> Loggers:
        """Those that ``config.loggers`` names; raises ``PluginError`` for a missing one, or for a missing package."""
        names = [name.strip() for name in config.loggers.split(",") if name.strip()]
        return cls({name: _build(name, config) for name in names})

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def begin(self, config: RunConfig, folder: Path, next_round: int) -> None:
        """Raises ``RunError`` where one cannot begin: there is time to mend it, as nobody was asked yet."""
        for name, logger in self._loggers.items():
            try:
                logger.begin(config, folder, next_round)
            except InputError:
                raise
            except Exception as error:
                raise RunError(
                    f"loggers={name!r} cannot begin ({type(error).__name__}: {error}); mend it, or go on without: "
                    f"fed-dpsat resume {folder} --set loggers="
                ) from error

    def round(self, record: Mapping[str, Any]) -> None:
        """One more round."""
        self._tell(lambda logger: logger.round(copy.deepcopy(record)), f"round {record['round']}")

    def end(self, summary: Mapping[str, Any]) -> None:
        """The end, whatever it was."""
        self._tell(lambda logger: logger.end(copy.deepcopy(summary)), "the end")

    def _tell(self, tell: Callable[[RunLogger], None], of: str) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                tell(logger)
            except Exception as error:
                del self._loggers[name]
                log.warning(
                    "loggers: %s failed at %s (%s: %s) and is left out from here on; the run folder has everything",
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
