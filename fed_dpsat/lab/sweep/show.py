"""A sweep on the terminal: its progress, and at the end a row per cell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fed_dpsat.lab.sweep.run import Event, Shown, Swept
from fed_dpsat.lab.sweep.tables import Row
from fed_dpsat.run.metric import metric_of, value_of
from fed_dpsat.run.numbers import on_terminal, plain, with_noise
from fed_dpsat.tasks.metric import PERCENT, UNDEFINED, Metric


@contextmanager
def shown(console: Console, *, quiet: bool) -> Iterator[Shown]:
    """Yield the function to call after each run: it draws a bar on a terminal, else a line; a failure is a line."""
    columns = (
        *(TextColumn("run"), MofNCompleteColumn(), BarColumn(bar_width=12), TextColumn("{task.description}")),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False)),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("preparing", total=None)

        def show(event: Event) -> None:
            outcome = event.outcome
            line = f"{outcome.run.name}  {_result(event)}"
            progress.update(task, completed=event.done, total=event.total, description=line)
            if (not quiet and progress.disable) or outcome.error:
                console.print(f"{event.done}/{event.total}  {line}", markup=False, highlight=False, soft_wrap=True)

        yield show


def print_sweep(console: Console, swept: Swept, folder: Path) -> None:
    """Print the final cells, values at the edge of a search, failures, and omitted parts."""
    final = [row for row in swept.summary if row["stage"] == "final"]
    if final:
        console.print(_table(swept.columns, final, swept.metric))
    for row in final:
        if row["at_edge"]:
            where = ", ".join(_cell(row[key]) for key in swept.columns)
            console.print(f"at the edge of its list: {row['at_edge']} of {where}", soft_wrap=True, highlight=False)
    for outcome in swept.failed:
        console.print(f"failed: {outcome.run.name}: {outcome.error}", markup=False, soft_wrap=True, highlight=False)
    for line in swept.left_out:
        console.print(f"left out for the budget: {line}", soft_wrap=True, highlight=False)
    console.print(f"Privacy: {swept.privacy}.", soft_wrap=True, highlight=False)
    console.print(f"Tables: {folder}/results.csv, results.parquet, summary.csv", soft_wrap=True, highlight=False)


def _table(keys: list[str], rows: list[Row], metric: Metric) -> Table:
    head = f"test {metric.label} %" if metric.unit == PERCENT else f"test {metric.heading}"
    table = Table(*keys, "n", head, "sd", "95 % ±", "epsilon", "delta", box=None, pad_edge=False)
    for row in rows:
        mean, *spread = (row[f"{metric.name}_{part}"] for part in ("mean", "sd", "ci95"))
        numbers = [
            UNDEFINED if mean is None and row["n"] else _number(mean, metric),
            *(_number(v, metric) for v in spread),
        ]
        count = f"{row['n']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
        epsilon = "" if row["epsilon_max"] is None else f"{row['epsilon_max']:.3g}"
        table.add_row(*(_cell(row[key]) for key in keys), count, *numbers, epsilon, f"{row['delta']:g}")
    return table


def _result(event: Event) -> str:
    outcome = event.outcome
    if outcome.error:
        return f"{'failed, runs again' if event.retried else 'failed twice'}: {outcome.error}"
    metric = metric_of(outcome.summary)
    score = with_noise(on_terminal(value_of(outcome.summary[metric.key]), metric), metric, outcome.summary)
    return f"{metric.label} {score}  {outcome.number('seconds'):.1f} s"


def _cell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None, metric: Metric) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f}" if metric.unit == PERCENT else plain(value, 4)
