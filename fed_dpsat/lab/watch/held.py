"""Warnings during a live view: shown in the view, and printed after its end."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler

RECENT, OF_A_KIND, KEPT = 3, 3, 100


class HeldWarnings(logging.Handler):
    """Counts warnings; keeps the last ``RECENT``, and the first ``OF_A_KIND`` of each kind up to ``KEPT`` in total.

    A kind is a log message without its arguments, so a thousand dropped clients are one kind.
    """

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.recent: deque[str] = deque(maxlen=RECENT)
        self.count = 0
        self._kinds: Counter[str] = Counter()
        self._kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self.count += 1
        self.recent.append(text)
        self._kinds[str(record.msg)] += 1
        if self._kinds[str(record.msg)] <= OF_A_KIND and len(self._kept) < KEPT:
            self._kept.append(text)

    def lines(self) -> list[str]:
        """The kept warnings in order, and the number of further ones."""
        more = self.count - len(self._kept)
        return self._kept + ([f"and {more:,} more warnings like these"] if more else [])


@contextmanager
def held_in_place_of_printed(held: HeldWarnings, logger: logging.Logger, console: Console) -> Iterator[None]:
    """Replace the handlers that print to ``console`` by ``held``; after the block, print the warnings of ``held``."""
    printing = [h for h in logger.handlers if isinstance(h, RichHandler) and h.console is console]
    for handler in printing:
        logger.removeHandler(handler)
    logger.addHandler(held)
    try:
        yield
    finally:
        logger.removeHandler(held)
        for handler in printing:
            logger.addHandler(handler)
        for line in held.lines():
            console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
