"""Where the time of a round goes, by phase, and a trace of who was at work when."""

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
    """Seconds by phase; one inside another is counted once, as itself. With ``trace``, every stretch is kept."""

    def __init__(self, *, trace: bool = False) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._mark = time.perf_counter()
        self._events: list[dict[str, Any]] | None = [] if trace else None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """``name`` while the block runs."""
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
        """``items``; the time until each is there counts as ``name``."""
        iterator = iter(items)
        while True:
            with self(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float]:
        """Seconds by phase since they were last taken."""
        self._turn()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def add_span(self, name: str, row: int, started: float, seconds: float) -> None:
        """``name`` was at work, from ``started`` (seconds since the epoch) on; rows are lines of the trace."""
        if self._events is not None:
            times = {"ts": MICROSECONDS * started, "dur": MICROSECONDS * seconds}
            self._events.append({"name": name, "ph": "X", "pid": 0, "tid": row, **times})

    def write_trace(self, path: Path, rows: Iterable[str]) -> None:
        """As JSON that chrome://tracing and ui.perfetto.dev show; ``rows`` name the lines."""
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
