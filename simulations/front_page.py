"""The picture and the figures of the front page, measured anew.

``python -m simulations.front_page`` trains ``simulations/digits_dpsat.toml`` at epsilon 1, 3 and 8 and without privacy,
for five seeds each, and writes ``docs/curves.png`` and the table of README.md, in a minute or two. With ``--check`` it
trains one seed of each and ends with 1 if a figure of README.md is farther than ``TOLERANCE`` points from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from fed_dpsat import RunConfig, simulate
from fed_dpsat.lab.report import canvas
from fed_dpsat.lab.report.palette import BLACK, BLUE, GREEN, VERMILLION
from fed_dpsat.lab.sweep.statistics import half_width

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "curves.png"
CONFIG = Path(__file__).parent / "digits_dpsat.toml"
SEEDS = range(5)
TOLERANCE = 4.0
BEGIN, END = "<!-- figures: python -m simulations.front_page -->\n", "<!-- figures: end -->\n"
CELLS: dict[str, dict[str, Any]] = {
    "1": {"target_epsilon": 1.0},
    "3": {"target_epsilon": 3.0},
    "8": {"target_epsilon": 8.0},
    "none": {"private": False, "target_epsilon": 0.0},
}
COLOURS = {"1": VERMILLION, "3": BLUE, "8": GREEN, "none": BLACK}

Curves = dict[str, list[list[dict[str, Any]]]]
"""By cell, the evaluated lines of ``rounds.jsonl`` of each seed."""


def measured(seeds: Iterable[int]) -> Curves:
    """A run of each cell and seed."""
    config = RunConfig.load(CONFIG)
    found: Curves = {cell: [] for cell in CELLS}
    with tempfile.TemporaryDirectory() as folder:
        for cell, changes in CELLS.items():
            for seed in seeds:
                out = Path(folder, f"{cell}-{seed}")
                simulate(dataclasses.replace(config, seed=seed, **changes), out)
                lines = map(json.loads, (out / "rounds.jsonl").read_text().splitlines())
                found[cell].append([line for line in lines if line["test_accuracy"] is not None])
    return found


def accuracies(curves: Curves) -> dict[str, list[float]]:
    """By cell, the accuracy of each seed after the last round, in percent."""
    return {cell: [100 * lines[-1]["test_accuracy"] for lines in runs] for cell, runs in curves.items()}


def table(found: dict[str, list[float]], day: str) -> str:
    """The lines of README.md between ``BEGIN`` and ``END``."""
    head = ["epsilon", *(cell if cell != "none" else "without privacy" for cell in found)]
    row = ["test accuracy", *(f"{fmean(values):.1f} % ± {half_width(values):.1f}" for values in found.values())]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), row)]
    count = len(next(iter(found.values())))
    return "\n".join(lines) + f"\n\nMean of {count} seeds with its 95 % interval, measured on {day}.\n"


def stated(text: str) -> dict[str, float]:
    """The means in the table of ``text``, by cell."""
    rows = text.partition(BEGIN)[2].partition(END)[0].splitlines()
    return dict(zip(CELLS, map(float, re.findall(r"([\d.]+) %(?= ±)", rows[2])), strict=True))


def draw(curves: Curves, path: Path) -> None:
    """Accuracy against rounds and against epsilon: a mean and the range of the seeds."""
    canvas.matplotlib()
    from matplotlib.figure import Figure

    with canvas.style():
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        against_rounds, against_epsilon = figure.subplots(1, 2, sharey=True)
        for cell, runs in curves.items():
            rounds = [line["round"] for line in runs[0]]
            points = [[100 * run[i]["test_accuracy"] for run in runs] for i in range(len(rounds))]
            colour, means = COLOURS[cell].light, [fmean(point) for point in points]
            label = "without privacy" if cell == "none" else f"epsilon {cell}"
            against_rounds.plot(rounds, means, color=colour, label=label)
            low, high = [min(point) for point in points], [max(point) for point in points]
            against_rounds.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)
            if cell != "none":
                spent = [line["epsilon"] for line in runs[0]]
                against_epsilon.plot(spent, means, color=colour)
                against_epsilon.fill_between(spent, low, high, color=colour, alpha=0.15, linewidth=0)
        against_rounds.set(xlabel="round", ylabel="test accuracy (%)", ylim=(0, 100))
        against_epsilon.set(xlabel="epsilon spent (maximum over clients, PLD)")
        against_rounds.legend(loc="lower right")
        figure.savefig(path, dpi=160)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare README.md with one seed, and write nothing")
    if parser.parse_args().check:
        sys.exit(problem(accuracies(measured([0])), README.read_text()))
    curves = measured(SEEDS)
    lines = table(accuracies(curves), datetime.date.today().isoformat())
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}{lines}{END}{rest.partition(END)[2]}")
    draw(curves, PICTURE)
    print(lines)


def problem(found: dict[str, list[float]], text: str) -> str | None:
    """The figures of ``text`` that are farther than ``TOLERANCE`` points from ``found``; None without one."""
    said = stated(text)
    wrong = [
        f"epsilon {cell}: README.md says {said[cell]:.1f} %, and this run has {fmean(values):.1f} %"
        for cell, values in found.items()
        if abs(said[cell] - fmean(values)) > TOLERANCE
    ]
    return "; ".join(wrong) or None


if __name__ == "__main__":
    main()
