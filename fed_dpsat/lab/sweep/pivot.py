"""A Markdown table from ``results.csv``: ``python -m fed_dpsat.lab.sweep.pivot RESULTS --rows method --columns seed``.

The metric that ``sweep.json`` beside RESULTS names, else test accuracy: mean (sd) over the completed seeds, shares in
percent. ``--against`` adds the mean difference to that row on the same seeds with its 95 % interval (Student's t), in
bold if the interval excludes 0.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fed_dpsat.errors import InputError
from fed_dpsat.lab.sweep.statistics import difference, spread
from fed_dpsat.lab.sweep.tables import COMPLETED
from fed_dpsat.run.metric import metric_of
from fed_dpsat.tasks.metric import PERCENT, Metric

Cells = Mapping[tuple[str, str], Mapping[int, float]]
"""The metric in its unit by seed, by (row, column)."""


def read(path: Path, rows: str, columns: str, where: Sequence[str] = ()) -> Cells:
    """The completed final runs in ``path`` by the columns ``rows`` and ``columns``; ``where`` is ``key=value`` each.

    Raises ``InputError`` for a missing column, for two runs of one seed in a cell, and for a run without a value.
    """
    metric = metric_beside(path)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    filters = dict(condition.partition("=")[::2] for condition in where)
    for name in (rows, columns, metric.name, *filters):
        if found and name not in found[0]:
            raise InputError(f"{path} has no column {name!r}, only {', '.join(found[0])}")
    cells: dict[tuple[str, str], dict[int, float]] = {}
    for run in found:
        if run["stage"] != "final" or any(run[key] != value for key, value in filters.items()):
            continue
        cell = cells.setdefault((run[rows], run[columns]), {})
        if run["status"] != COMPLETED:
            continue
        if int(run["seed"]) in cell:
            raise InputError(
                f"{path} has several runs of seed {run['seed']} for {rows}={run[rows]}, {columns}={run[columns]}; "
                "tell them apart with --where KEY=VALUE"
            )
        if not run[metric.name]:
            raise InputError(
                f"{path}: {metric.label} is undefined in the run of seed {run['seed']} of {rows}={run[rows]}, "
                f"{columns}={run[columns]}; choose other runs with --where KEY=VALUE"
            )
        cell[int(run["seed"])] = metric.scale * float(run[metric.name])
    return cells


def metric_beside(results: Path) -> Metric:
    """The metric of a sweep by ``sweep.json`` beside its ``results``; accuracy without one."""
    path = results.with_name("sweep.json")
    return metric_of(json.loads(path.read_text()) if path.exists() else {})


def markdown(cells: Cells, corner: str, against: str = "", digits: int = 1) -> str:
    """One line per row, in the order of the file; a cell with fewer seeds than others states its n."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    if against and against not in rows:
        raise InputError(f"--against {against!r} is not a row; choose one of {', '.join(rows)}")
    most = max((len(values) for values in cells.values()), default=0)
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        shown = []
        for column in columns:
            values, reference = cells.get((row, column), {}), cells.get((against, column), {})
            text = spread(list(values.values()), digits) + (f", n = {len(values)}" if len(values) < most else "")
            if against and row != against:
                seeds = sorted(values.keys() & reference.keys())
                text += f"<br>{difference([values[s] for s in seeds], [reference[s] for s in seeds], digits)}"
            shown.append(text)
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS", help="results.csv of a sweep")
    parser.add_argument("--rows", required=True, help="column whose values become rows")
    parser.add_argument("--columns", required=True, help="column whose values become columns")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only these runs")
    parser.add_argument("--against", default="", help="row to which the others are compared, seed by seed")
    parser.add_argument("--digits", type=int, help="after the point; default: 1 in percent, else 3")
    chosen = parser.parse_args()
    try:
        cells = read(chosen.results, chosen.rows, chosen.columns, chosen.where)
        usual = 1 if metric_beside(chosen.results).unit == PERCENT else 3
        digits = usual if chosen.digits is None else chosen.digits
        print(markdown(cells, chosen.rows, chosen.against, digits), end="")
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
