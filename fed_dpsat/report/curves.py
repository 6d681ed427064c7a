"""Accuracy against rounds and against epsilon, from run folders: ``python -m fed_dpsat.report.curves RUN...``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``(summary, evaluated rounds)`` of a run folder."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return summary, [line for line in lines if line["test_accuracy"] is not None]


def draw_curves(folders: Sequence[Path], path: Path) -> None:
    """Two panels, one curve per run, written to ``path`` in the format of its suffix."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        against_rounds, against_epsilon = figure.subplots(1, 2, sharey=True)
        for colour, folder in zip(COLOURS, folders, strict=False):
            summary, rounds = read_run(folder)
            accuracy = [100 * line["test_accuracy"] for line in rounds]
            name = (
                f"{summary['dataset']}, {summary['optimizer']}, {summary['num_clients']} clients, "
                f"seed {summary['seed']}"
            )
            against_rounds.plot([line["round"] for line in rounds], accuracy, color=colour, label=name)
            against_epsilon.plot([line["epsilon"] for line in rounds], accuracy, color=colour)
            end = f"{accuracy[-1]:.1f} % at ({summary['epsilon']:.3g}, {summary['delta']:g})"
            against_epsilon.annotate(
                end, (rounds[-1]["epsilon"], accuracy[-1]), xytext=(0, 5), textcoords="offset points",
                ha="right", va="bottom", color=colour,
            )  # fmt: skip
        against_rounds.set(xlabel="round", ylabel="test accuracy (%)", ylim=(0, 100))
        against_epsilon.set(xlabel="epsilon spent (maximum over clients, PLD)")
        against_rounds.legend(frameon=False, loc="lower right")
        for axes in (against_rounds, against_epsilon):
            axes.grid(alpha=0.25)
        figure.savefig(path, dpi=160)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"run folder, at most {len(COLOURS)}")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="figure to write: .png, .svg or .pdf")
    arguments = parser.parse_args()
    if len(arguments.runs) > len(COLOURS):
        parser.error(f"{len(arguments.runs)} runs are more than the {len(COLOURS)} that stay readable")
    draw_curves(arguments.runs, arguments.out)


if __name__ == "__main__":
    main()
