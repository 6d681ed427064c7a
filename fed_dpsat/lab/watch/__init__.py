"""The display of an active run: a live view on a terminal, else a line per round, or nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from fed_dpsat.lab.watch.held import HeldWarnings, held_in_place_of_printed
from fed_dpsat.lab.watch.progress import Progress
from fed_dpsat.lab.watch.view import View, round_line
from fed_dpsat.settings.config import RunConfig

OnRound = Callable[[dict[str, Any]], None]

REFRESHES_PER_SECOND = 4


@contextmanager
def watched(
    config: RunConfig,
    *,
    name: str,
    folder: Path,
    console: Console,
    quiet: bool = False,
    earlier: Iterable[Mapping[str, Any]] = (),
) -> Iterator[OnRound]:
    """Yield the function to call after each round; ``earlier`` are the old rounds of a resumed run.

    ============ ==============================================================================
    console      display
    ============ ==============================================================================
    a terminal   a view that stays in place, with ``folder`` and the last warnings; all warnings at its end
    no terminal  a line per round; the handlers of the log print warnings
    quiet        no rounds
    ============ ==============================================================================
    """
    progress = Progress.of(config, earlier)
    if quiet:
        yield lambda record: None
    elif not console.is_terminal:
        yield lambda record: console.print(round_line(progress.add(record)), soft_wrap=True)
    else:
        held = HeldWarnings()
        view = View(title=f"{name}: {_what(config)}", folder=folder, progress=progress, held=held, clock=time.monotonic)
        live = Live(get_renderable=lambda: view, console=console, refresh_per_second=REFRESHES_PER_SECOND)
        with held_in_place_of_printed(held, logging.getLogger(), console), live:
            yield view.add


def _what(config: RunConfig) -> str:
    return f"{config.optimizer}, {config.model} on {config.dataset}, {config.num_clients:,} clients"
