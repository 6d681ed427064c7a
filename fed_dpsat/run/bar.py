"""The progress bar of ``simulate``: on a terminal and in a notebook, nothing elsewhere."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fed_dpsat.run.metric import value_of
from fed_dpsat.run.numbers import in_unit, with_noise
from fed_dpsat.tasks.metric import Metric

SECONDS = 0.2
"""Least time between two updates of a notebook, each of which is a message to the browser."""

Show = Callable[[Mapping[str, Any]], None]


@contextmanager
def progress_bar(num_rounds: int, metric: Metric) -> Iterator[Show]:
    """Yield the function to call with each line of ``rounds.jsonl``.

    Rich draws the bar. In a notebook it goes through IPython's ``display``, because rich's own way needs ipywidgets.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("round"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, TextColumn("{task.description}"), console=console)
    task, measured = bar.add_task("", total=num_rounds), ""

    def update(record: Mapping[str, Any]) -> None:
        nonlocal measured
        if (value := value_of(record[metric.key])) is not None:
            measured = f"{metric.label} {with_noise(in_unit(value, metric), metric, record)}, "
        bar.update(task, completed=record["round"], description=f"{measured}epsilon {float(record['epsilon']):.2f}")

    if console.is_jupyter:
        with _in_notebook(bar) as draw:

            def update_and_draw(record: Mapping[str, Any]) -> None:
                update(record)
                draw()

            yield update_and_draw
    elif console.is_terminal:
        with bar:
            yield update
    else:
        yield lambda record: None


@contextmanager
def _in_notebook(bar: Any) -> Iterator[Callable[[], None]]:
    """Yield the function that draws ``bar`` again below its cell, at most every ``SECONDS``."""
    handle, drawn = importlib.import_module("IPython.display").display(bar, display_id=True), time.monotonic()

    def draw() -> None:
        nonlocal drawn
        if time.monotonic() - drawn > SECONDS:
            drawn = time.monotonic()
            handle.update(bar)

    try:
        yield draw
    finally:
        handle.update(bar)
