"""Paired differences of DP-SAT to DP-SGD by epsilon, from a sweep's results.csv, as one figure.

``python -m simulations.dp_sat_figure RESULTS.csv FIGURE.svg``, with docs/results/dp_sat.csv for one. A dot is a seed; a
bar is the mean with its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from fed_dpsat.lab.report.canvas import style
from fed_dpsat.lab.report.palette import SERIES
from fed_dpsat.lab.sweep.pivot import Cells, read
from fed_dpsat.lab.sweep.statistics import half_width

REFERENCE = "dp-sgd"


def differences(cells: Cells, compared: str = "dp-sat") -> dict[str, list[float]]:
    """Epsilon to the differences of ``compared`` to DP-SGD in percentage points, one per seed that both have."""
    found = {}
    for method, epsilon in cells:
        if method == compared:
            ours, theirs = cells[compared, epsilon], cells.get((REFERENCE, epsilon), {})
            found[epsilon] = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return found


def draw(results: Path, path: Path) -> None:
    """One panel, a colour per setting."""
    from matplotlib.figure import Figure

    settings = ("centralised", "federation")
    with style():
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="0.6", linewidth=0.8)
        ticks: list[str] = []
        for number, (series, setting) in enumerate(zip(SERIES, settings, strict=False)):
            colour, found = series.light, differences(read(results, "method", "target_epsilon", [f"setting={setting}"]))
            ticks = [f"{float(epsilon):g}" for epsilon in found] or ticks
            for place, values in enumerate(found.values()):
                if not values:
                    continue
                at = place + (number - 0.5) * 0.3
                axes.plot([at + 0.07] * len(values), values, ".", color=colour, alpha=0.45, markersize=5)
                axes.errorbar(
                    at, fmean(values), half_width(values), fmt="sD"[number], color=colour, capsize=3, markersize=5,
                    label=f"{setting}, n = {len(values)} seeds" if not place else None,
                )  # fmt: skip
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(xlabel="epsilon (delta 1e-5)", ylabel="DP-SAT minus DP-SGD,\ntest accuracy (percentage points)")
        axes.legend()
        axes.grid(visible=False, axis="x")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=160)


def command_line(description: str | None, draw: Callable[[Path, Path], None]) -> None:
    """Draw the figure of the arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("figure", type=Path, help=".svg, .png or .pdf")
    chosen = parser.parse_args()
    draw(chosen.results, chosen.figure)


if __name__ == "__main__":
    command_line(__doc__, draw)
