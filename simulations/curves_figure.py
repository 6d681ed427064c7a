"""Accuracy against rounds and against epsilon, from run folders: ``python -m simulations.curves_figure RUN...``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fed_dpsat.lab.report import canvas
from fed_dpsat.lab.report.palette import SERIES, looks
from fed_dpsat.lab.report.reading import Run, read_run


def draw_curves(folders: Sequence[Path], path: Path) -> None:
    """Draw two panels with one curve per run into ``path``, in the format of its suffix."""
    canvas.matplotlib()
    from matplotlib.figure import Figure

    runs = [read_run(folder) for folder in folders]
    with canvas.style():
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        against_rounds, against_epsilon = figure.subplots(1, 2, sharey=True)
        for look, run in zip(looks([str(i) for i in range(len(runs))]).values(), runs, strict=True):
            lines, colour = run.evaluated, look.colour.light
            accuracy = [100 * line["test_accuracy"] for line in lines]
            against_rounds.plot([line["round"] for line in lines], accuracy, color=colour, label=_label(run))
            against_epsilon.plot([line["epsilon"] for line in lines], accuracy, color=colour)
            end = f"{accuracy[-1]:.1f} % at ({run.epsilon:.3g}, {run.config.delta:g})"
            against_epsilon.annotate(
                end, (lines[-1]["epsilon"], accuracy[-1]), xytext=(0, 5), textcoords="offset points",
                ha="right", va="bottom", color=colour,
            )  # fmt: skip
        against_rounds.set(xlabel="round", ylabel="test accuracy (%)", ylim=(0, 100))
        accountants = ", ".join(sorted({run.config.accountant.upper() for run in runs}))
        against_epsilon.set(xlabel=f"epsilon spent (maximum over clients, {accountants})")
        against_rounds.legend(loc="lower right")
        figure.savefig(path, dpi=160)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"run folder, at most {len(SERIES)}")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="figure to write: .png, .svg or .pdf")
    arguments = parser.parse_args()
    if len(arguments.runs) > len(SERIES):
        parser.error(f"{len(arguments.runs)} runs are more than the {len(SERIES)} that stay readable")
    draw_curves(arguments.runs, arguments.out)


def _label(run: Run) -> str:
    config = run.config
    return f"{config.dataset}, {run.method}, {config.num_clients} clients, seed {config.seed}"


if __name__ == "__main__":
    main()
