"""The display of a run: a few lines that stay in place on a terminal, or one line per round without a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fed_dpsat.lab.watch.held import HeldWarnings
from fed_dpsat.lab.watch.progress import Progress
from fed_dpsat.lab.watch.sparkline import ASCII, BLOCKS, sparkline
from fed_dpsat.run.metric import LOSS
from fed_dpsat.run.numbers import on_terminal, speed
from fed_dpsat.tasks.metric import Metric, Value

NARROW = 70
"""With fewer columns, a bar goes below its numbers and not beside them."""

LABEL, LEAST_NUMBER, NOTE = 10, 8, 27
"""Least columns of the parts of a row; the bar gets the rest."""

PHASES = ("send", "train", "aggregate", "evaluate")

Row = tuple[str, str, RenderableType | None, str]


class View:
    """A renderable of ``progress`` at the time of the drawing; ``clock`` gives seconds."""

    def __init__(
        self, *, title: str, folder: Path, progress: Progress, held: HeldWarnings, clock: Callable[[], float]
    ) -> None:
        self.title, self.folder, self.progress, self.held, self.clock = title, folder, progress, held, clock
        self._started = self._last = clock()

    def add(self, record: dict[str, Any]) -> None:
        """Add a round."""
        self._last = self.clock()
        self.progress.add(record)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < NARROW
        metric = self.progress.metric
        label_width = max(LABEL, 1 + max(map(len, metric.label.split() if narrow else [metric.label])))
        shown = on_terminal(self.progress.latest(metric.key), metric) if self.progress.measured(metric.key) else ""
        shown = self.progress.with_noise(shown, metric)
        number_width = max(LEAST_NUMBER, 2 * len(str(self.progress.num_rounds)) + 1, len(shown))
        wide = options.max_width - label_width - (0 if narrow else number_width + NOTE + 2)
        yield Text(self.title, style="bold", overflow="ellipsis", no_wrap=True)
        grid = Table.grid(padding=(0, 1, 0, 0))
        for label, number, bar, note in self._rows(max(8, wide), ASCII if options.ascii_only else BLOCKS):
            if narrow or bar is None:
                grid.add_row(Text(label, style="dim"), Text(f"{number}  {note}".strip()))
                if bar is not None:
                    grid.add_row("", bar)
            else:
                beside = Table.grid(padding=(0, 1, 0, 0))
                beside.add_column(width=number_width)
                beside.add_column(width=max(8, wide))
                beside.add_row(Text(number), bar, Text(note, style="dim"))
                grid.add_row(Text(label, style="dim"), beside)
        grid.columns[0].width = label_width - 1
        yield grid
        yield from self._warnings()

    def _rows(self, width: int, ramp: str) -> Iterator[Row]:
        progress = self.progress
        bar = _bar(progress.done, progress.num_rounds, width, "green")
        yield "round", f"{progress.done}/{progress.num_rounds}", bar, self._times()
        for metric in _shown(progress.metric):
            if values := progress.measured(metric.key):
                curve = Text(sparkline(values, width, ramp), style="cyan")
                latest = progress.with_noise(_text(progress.latest(metric.key), metric), metric)
                yield metric.label, latest, curve, _extremes(values, metric)
        if progress.last is None:
            yield "preparing", "", None, ""
            yield "folder", str(self.folder), None, ""
            return
        yield self._epsilon(width)
        yield "clients", _counts(progress), None, ""
        if "timing" in progress.last and progress.done:
            timing = progress.last["timing"]
            memory = f"{timing['peak_memory_mb']:.0f} MB without workers"
            yield "pace", f"{speed(timing)}, {memory}", None, ""
            yield "a round", f"{timing['seconds']:.3g} s: {phases_text(timing['phases'])}", None, ""
        yield "folder", str(self.folder), None, ""

    def _times(self) -> str:
        now = self.clock()
        left = self.progress.seconds_left(now - self._last)
        return duration(now - self._started) + (
            "" if left is None or self.progress.done >= self.progress.num_rounds else f", {duration(left)} left"
        )

    def _epsilon(self, width: int) -> Row:
        progress = self.progress
        assert progress.last is not None
        spent, at = float(progress.last["epsilon"]), f"at delta {progress.delta:g}, {progress.accountant}"
        if not math.isfinite(spent):
            return "epsilon", "inf", None, "no noise, no guarantee"
        if not math.isfinite(progress.budget):
            return "epsilon", f"{spent:.3f}", None, f"no budget, {at}"
        bar = _bar(spent, progress.budget, width, "magenta")
        return "epsilon", f"{spent:.3f}", bar, f"of {progress.budget:g} {at}"

    def _warnings(self) -> Iterator[RenderableType]:
        if self.held.count:
            yield Text(f"{self.held.count:,} warning{'s'[: self.held.count > 1]}", style="yellow")
            for text in list(self.held.recent):
                yield Padding(Text(text, overflow="ellipsis", no_wrap=True), (0, 0, 0, 2))


def phases_text(phases: Mapping[str, float]) -> str:
    """Seconds of the phases of every round, in order; the summary has all phases."""
    return ", ".join(f"{name} {phases[name]:.2g}" for name in PHASES if name in phases)


def round_line(progress: Progress) -> str:
    """The last round in one line, with the last evaluation and the expected time of the remaining rounds."""
    record: Mapping[str, Any] | None = progress.last
    assert record is not None
    last = [(metric, progress.latest(metric.key)) for metric in _shown(progress.metric)]
    said = {metric: progress.with_noise(_text(value, metric), metric) for metric, value in last if value is not None}
    quality = "".join(f"{metric.label} {text}  " for metric, text in said.items())
    rate = f"  {record['timing']['clients_per_second']:.3g} clients/s" if record["round"] else ""
    if (left := progress.seconds_left(0.0)) and progress.done < progress.num_rounds:
        rate += f"  {duration(left)} left"
    return f"round {record['round']}/{progress.num_rounds}  {quality}epsilon {float(record['epsilon']):.2f}{rate}"


def duration(seconds: float) -> str:
    """``seconds`` as text: 7 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _shown(main: Metric) -> list[Metric]:
    return [main] if main == LOSS else [main, LOSS]


def _text(value: Value | None, metric: Metric) -> str:
    if metric == LOSS and isinstance(value, float) and not 1e3 <= abs(value) < math.inf:
        return f"{value:.3f}"
    return on_terminal(value, metric)


def _extremes(values: Sequence[float], metric: Metric) -> str:
    """The lowest and the highest of ``values``; the lowest is marked if it is the best of a metric."""
    finite = [value for value in values if math.isfinite(value)] or [math.nan]
    best = "" if metric.higher_is_better or metric == LOSS else " (best)"
    return f"{_text(min(finite), metric)}{best} to {_text(max(finite), metric)}"


def _bar(completed: float, total: float, width: int, style: str) -> ProgressBar:
    return ProgressBar(total=total, completed=completed, width=width, complete_style=style, finished_style=style)


def _counts(progress: Progress) -> str:
    last = progress.last
    assert last is not None
    text = f"{len(last['asked'])} asked, {last['accepted']} accepted, {len(last['dropped'])} dropped"
    if progress.done > 1:
        text += "; in all " + ", ".join(f"{progress.total(name):,}" for name in ("asked", "accepted", "dropped"))
    if retired := progress.total("retired"):
        text += f"; {retired:,} retired"
    return text
