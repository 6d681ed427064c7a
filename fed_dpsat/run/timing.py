"""Seconds of a round by phase, and a trace of phases and clients over time."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fed_dpsat.errors import written

T = TypeVar("T")

MICROSECONDS = 1e6


class Phases:
    """Seconds by phase; a nested phase counts only as itself. With ``trace``, every span is stored."""

    def __init__(self, *, trace: bool = False) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._mark = time.perf_counter()
        self._events: list[dict[str, Any]] | None = [] if trace else None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of the block as ``name``."""
        started, clock = time.time(), time.perf_counter()
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()
            self.add_span(name, 0, started, time.perf_counter() - clock)

    def waiting_for(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``; the time to wait for each counts as ``name``."""
        iterator = iter(items)
        while True:
            with self(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        self._turn()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def add_span(self, name: str, row: int, started: float, seconds: float) -> None:
        """Add a span of ``name`` that begins at ``started`` (seconds since the epoch), in line ``row`` of the trace."""
        if self._events is not None:
            times = {"ts": MICROSECONDS * started, "dur": MICROSECONDS * seconds}
            self._events.append({"name": name, "ph": "X", "pid": 0, "tid": row, **times})

    def write_trace(self, path: Path, rows: Iterable[str]) -> None:
        """Write JSON for chrome://tracing and ui.perfetto.dev; ``rows`` names the lines."""
        names: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": name}}
            for row, name in enumerate(rows)
        ]
        with written(path):
            path.write_text(json.dumps({"traceEvents": names + (self._events or [])}))

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now
