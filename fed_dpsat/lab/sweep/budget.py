"""What a sweep will take, from what one run of each kind took, and what to leave out to stay below a number of minutes.

In this order, until it fits: seeds of the tuning, down to one; seeds of the grid, down to three; rounds, of all runs
alike, down to a tenth. Noise is calibrated for the rounds that are left, so epsilon stays. Values of the grid and of
the search stay too: which to take out is for who asks.
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
"""Axes along which a run takes as long."""

Kind = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of one run: ``fixed`` to start, load and calibrate, ``rounds`` for all its rounds."""

    fixed: float
    rounds: float


def kind(cell: Cell) -> Kind:
    """What a run's time depends on: its labels on all axes but those of the noise."""
    return tuple(label for axis, label in cell.labels.items() if axis not in INDIFFERENT)


def minutes(spec: Spec, costs: Mapping[Kind, Cost], workers: int) -> float:
    """Of all runs of ``spec`` on that many workers, 0 being this process."""
    total = 0.0
    for cell in spec.cells():
        runs = len(spec.tune_runs(cell)) + len(spec.seeds)
        cost = costs[kind(cell)]
        total += runs * (cost.fixed + spec.rounds_share * cost.rounds)
    return total / max(workers, 1) / 60


def shrink(spec: Spec, costs: Mapping[Kind, Cost], budget: float, workers: int) -> tuple[Spec, list[str]]:
    """``spec`` with as much left out as ``budget`` minutes ask for, and what that is.

    Raises ``SettingError`` for a budget that even the least does not fit.
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
            f"at least {least:.1f} minutes, which a tenth of the rounds would take",
            "raise it, or take values out of the grid or the search",
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
