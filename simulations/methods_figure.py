"""Every method's paired difference to DP-SGD, a panel per epsilon, from a sweep's results.csv, as one figure.

``python -m simulations.methods_figure RESULTS.csv FIGURE.svg``, with docs/results/methods.csv for one. A dot is a seed,
a square the mean with its 95 % interval (Student's t). A mean below the axis is an arrow with its number.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from fed_dpsat.lab.report.canvas import style
from fed_dpsat.lab.report.palette import BLUE, MUTED
from fed_dpsat.lab.sweep.pivot import read
from fed_dpsat.lab.sweep.statistics import half_width
from simulations.dp_sat_figure import REFERENCE, command_line, differences

LOWEST = -7.5
"""The end of the axis in percentage points, so that readers can distinguish the other points."""


def draw(results: Path, path: Path) -> None:
    """A row per method, in the order of the file."""
    from matplotlib.figure import Figure

    cells = read(results, "method", "target_epsilon")
    methods, epsilons = (list(dict.fromkeys(key[i] for key in cells if key[0] != REFERENCE)) for i in (0, 1))
    with style():
        figure = Figure(figsize=(7.2, 0.5 + 0.27 * len(methods)), layout="constrained")
        panels = figure.subplots(1, len(epsilons), sharex=True, sharey=True, squeeze=False)[0]
        for axes, epsilon in zip(panels, epsilons, strict=True):
            axes.axvline(0, color="0.6", linewidth=0.8)
            for place, method in enumerate(methods):
                values = differences(cells, method).get(epsilon, [])
                if values and fmean(values) < LOWEST:
                    axes.plot(LOWEST, place, "<", color=MUTED.light)
                    axes.annotate(
                        f"{fmean(values):.0f}", (LOWEST, place), xytext=(5, 0), textcoords="offset points", va="center"
                    )
                elif values:
                    axes.plot(values, [place] * len(values), ".", color=BLUE.light, alpha=0.35, markersize=4)
                    axes.errorbar(fmean(values), place, xerr=half_width(values), fmt="s", color=BLUE.light, capsize=2)
            axes.set_title(f"epsilon {float(epsilon):g}")
            axes.grid(visible=False, axis="y")
        panels[0].set_yticks(range(len(methods)), methods)
        panels[0].invert_yaxis()
        panels[0].set_xlim(left=LOWEST - 0.5)
        seeds = max(len(values) for values in cells.values())
        figure.supxlabel(
            f"minus DP-SGD, test accuracy (percentage points); delta 1e-5, n = {seeds} seeds", fontsize="medium"
        )
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=160)


if __name__ == "__main__":
    command_line(__doc__, draw)
