"""The duration of a sweep from one measured run of each kind, and its reduction to a number of minutes.

The reduction removes, in this order, until the sweep fits: seeds of the tuning, down to one; seeds of the grid, down to
three; an equal share of the rounds of all runs, down to a tenth. The noise is calibrated for the remaining rounds, so
epsilon stays. Values of the grid and of the search stay too: only the user can choose among them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fed_dpsat.errors import SettingError
from fed_dpsat.lab.sweep.spec import Cell, Spec

FEWEST_SEEDS, LEAST_ROUNDS = 3, 0.1
INDIFFERENT = ("target_epsilon", "noise_multiplier", "delta")
"""Axes that do not change the time of a run."""

Kind = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of one run: ``fixed`` to start, load and calibrate, ``rounds`` for all its rounds."""

    fixed: float
    rounds: float


def kind(cell: Cell) -> Kind:
    """The labels on which the time of a run depends: all axes except those of the noise."""
    return tuple(label for axis, label in cell.labels.items() if axis not in INDIFFERENT)


def minutes(spec: Spec, costs: Mapping[Kind, Cost], workers: int) -> float:
    """Minutes of all runs of ``spec`` on ``workers`` workers; 0 means this process."""
    total = 0.0
    for cell in spec.cells():
        runs = len(spec.tune_runs(cell)) + len(spec.seeds)
        cost = costs[kind(cell)]
        total += runs * (cost.fixed + spec.rounds_share * cost.rounds)
    return total / max(workers, 1) / 60


def shrink(spec: Spec, costs: Mapping[Kind, Cost], budget: float, workers: int) -> tuple[Spec, list[str]]:
    """``spec`` reduced to ``budget`` minutes, and a list of the omitted parts.

    Raises ``SettingError`` for a budget below the smallest reduction.
    """
    asked = spec
    while minutes(spec, costs, workers) > budget and len(spec.tune_seeds) > 1:
        spec = dataclasses.replace(spec, tune_seeds=spec.tune_seeds[:-1])
    while minutes(spec, costs, workers) > budget and len(spec.seeds) > FEWEST_SEEDS:
        spec = dataclasses.replace(spec, seeds=spec.seeds[:-1])
    if (most := minutes(spec, costs, workers)) > budget:
        fixed = minutes(dataclasses.replace(spec, rounds_share=0.0), costs, workers)
        share = max(0.0, (budget - fixed) / (most - fixed))
        spec = dataclasses.replace(spec, rounds_share=math.floor(share * 100) / 100)
    if spec.rounds_share < LEAST_ROUNDS:
        least = minutes(dataclasses.replace(spec, rounds_share=LEAST_ROUNDS), costs, workers)
        raise SettingError(
            "--budget",
            budget,
            f"at least {least:.1f} minutes, the time of a tenth of the rounds",
            "raise it, or remove values from the grid or the search",
        )
    left_out = []
    for what, before, after in (
        ("seeds of the tuning", asked.tune_seeds, spec.tune_seeds),
        ("seeds of the grid", asked.seeds, spec.seeds),
    ):
        if gone := before[len(after) :]:
            left_out.append(f"{len(gone)} of {len(before)} {what}: {', '.join(map(str, gone))}")
    if spec.rounds_share < 1:
        left_out.append(f"{1 - spec.rounds_share:.0%} of the rounds of every run")
    return spec, left_out
