"""Accuracy against epsilon of the studies of ``simulations.features``, as one figure and a table on standard output.

``python -m simulations.features_figure RESULTS.csv FIGURE.svg``, with docs/results/features.csv for one. A dot is a
seed; a bar is the mean with its 95 % interval (Student's t). Validation examples chose the settings of an arm, and
whether it is the last model or the average.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from fed_dpsat.lab.report.canvas import style
from fed_dpsat.lab.report.palette import SERIES
from fed_dpsat.lab.sweep.statistics import half_width
from simulations.dp_sat_figure import command_line

KINDS = ("accuracy", "averaged_accuracy")
NAME = re.compile(r"(?P<dataset>.+)-(?P<clients>\d+)-clients?-epsilon-(?P<epsilon>\d)(?P<rest>.*)")
TITLES = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}

Row = dict[str, str]


@dataclass(kw_only=True)
class Arm:
    """One arm of a study: what was tried on validation examples, and the test accuracies by seed of the choice."""

    tried: list[Row] = field(default_factory=list)
    tested: list[Row] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The last model or the average, whichever was better on validation examples."""
        return max(KINDS, key=lambda kind: max(float(row[kind]) for row in self.tried))

    @property
    def values(self) -> dict[int, float]:
        """Test accuracy in percent by seed."""
        return {int(row["seed"]): float(row[self.kind]) for row in self.tested}


def read(path: Path) -> dict[tuple[str, str], Arm]:
    """By study and arm, in the order of the file; arms without a finished test run are left out."""
    found: dict[tuple[str, str], Arm] = defaultdict(Arm)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            arm = found[row["study"], row["arm"]]
            (arm.tried if row["phase"] == "validation" else arm.tested).append(row)
    return {key: arm for key, arm in found.items() if arm.tested}


def table(arms: dict[tuple[str, str], Arm]) -> str:
    """A row of Markdown for each arm."""
    lines = [
        "| study | arm | model | settings | n | test accuracy, % | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for (study, name), arm in arms.items():
        values, seconds = list(arm.values.values()), fmean(float(row["seconds"]) for row in arm.tested)
        interval = f" ± {half_width(values):.2f}" if len(values) > 1 else ""
        model = "last" if arm.kind == KINDS[0] else "average"
        settings = arm.tested[0]["settings"].strip("{}").replace('"', "")
        accuracy = f"{fmean(values):.2f}{interval}"
        lines.append(f"| {study} | {name} | {model} | {settings} | {len(values)} | {accuracy} | {seconds:.0f} |")
    return "\n".join(lines)


def draw(results: Path, path: Path) -> None:
    """A panel for each data set, a colour for each number of clients."""
    from matplotlib.figure import Figure

    arms = read(results)
    print(table(arms))
    panels: dict[str, dict[str, dict[float, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    for (study, name), arm in arms.items():
        if (found := NAME.fullmatch(study)) and not found["rest"] and name == "linear":
            panels[found["dataset"]][found["clients"]][float(found["epsilon"])] = list(arm.values.values())
    with style():
        figure = Figure(figsize=(3.6 * max(1, len(panels)), 3.2), layout="constrained")
        for axes, (dataset, by_clients) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for series, (clients, by_epsilon) in zip(SERIES, by_clients.items(), strict=False):
                for place, (epsilon, values) in enumerate(sorted(by_epsilon.items())):
                    axes.plot([epsilon + 0.06] * len(values), values, ".", color=series.light, alpha=0.45, markersize=5)
                    label = f"{clients} client{'s' if clients != '1' else ''}" if not place else None
                    spread = half_width(values) if len(values) > 1 else 0.0
                    axes.errorbar(epsilon, fmean(values), spread, fmt="s", color=series.light, capsize=3, label=label)
            axes.set(xlabel="epsilon (delta 1e-5)", ylabel="test accuracy (%)", xticks=[1, 2, 3], xlim=(0.7, 3.3))
            axes.set_title(TITLES.get(dataset, dataset), loc="left")
            axes.legend()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=160)


if __name__ == "__main__":
    command_line(__doc__, draw)
