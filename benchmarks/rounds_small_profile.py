"""Where the time of a small client goes, by phase: ``python -m benchmarks.rounds --small --profile``.

The rounds after the first run under ``cProfile``. The time of a function of ``fed_dpsat`` is that of the phase of its
module, and the time of all other functions that of the phases which call them, in proportion. The profiler makes calls
of Python slower, so the table has the shares of the phases in a run with it, times the processor time of a client in a
run without it, which is ``total``. Products of matrices are slowed less: their share is somewhat too small.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import pstats
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.rounds_measure import Row
from benchmarks.rounds_small import STACK
from benchmarks.rounds_small_run import run, small_config

PHASES: Mapping[str, tuple[str, ...]] = {
    "server messages": ("flower/", "simulation/"),
    "ledger": ("accounting/",),
    "state files": ("simulation/state", "run/state_file.py"),
    "draws": ("step/noise.py", "step/sampling.py", "step/draws.py", "step/generators.py", "step/mechanism.py"),
    "arithmetic": ("step/", "data/", "models/", "tasks/", "params.py"),
    "records": ("flower/wire/", "client/assignment.py"),
    "judge": ("flower/judge.py",),
    "sums": ("flower/sums.py",),
    "client": ("client/", "flower/client_app.py"),
    "run folder": ("run/",),
}
"""Beginnings of the paths of modules below ``fed_dpsat``; the longest that fits counts."""

REST, TOTAL, CLOCK = "rest", "total", "on the clock"
PASSES = 200
"""From a function to those that call it: more than calls are deep within other packages."""

Function = tuple[str, int, str]


def profiled(args: argparse.Namespace) -> list[Row]:
    """Microseconds of a client by phase, a column for each model, number of local steps and cohort."""
    rows: dict[str, Row] = {name: {"phase": name} for name in (*PHASES, REST, TOTAL, CLOCK)}
    for model, steps, clients in itertools.product(args.small_models, args.small_steps, args.small_cohorts):
        given = {"clients": clients, "model": model, "local_steps": steps, "stack": (args.stack or [STACK])[0]}
        total, clock = _measured(given, args.rounds, None)
        profiler = cProfile.Profile()
        _measured(given, args.rounds, profiler)
        found = by_phase(pstats.Stats(profiler).stats)  # type: ignore[attr-defined]
        shown = {name: total * seconds / sum(found.values()) for name, seconds in found.items()}
        shown |= {TOTAL: total, CLOCK: clock}
        for name, row in rows.items():
            row[f"{model}, {steps}, {clients}"] = round(1e6 * shown[name] / clients)
    return list(rows.values())


def _measured(given: dict[str, Any], rounds: int, profiler: cProfile.Profile | None) -> tuple[float, float]:
    """Seconds of a round, of the processor and on the clock: without the first, and the last, which evaluates."""
    turns: list[tuple[float, float]] = []

    def turn() -> None:
        turns.append((time.process_time(), time.perf_counter()))
        if profiler and len(turns) == 2:
            profiler.enable()
        elif profiler and len(turns) == rounds + 2:
            profiler.disable()

    torch.set_num_threads(1)
    run(small_config(rounds=rounds + 2, **given), turn)
    of_processor, on_clock = ((b - a) / rounds for a, b in zip(turns[1], turns[rounds + 1], strict=True))
    return of_processor, on_clock


def by_phase(stats: Mapping[Function, Any]) -> dict[str, float]:
    """Seconds by phase, of ``pstats.Stats.stats``."""
    found = dict.fromkeys((*PHASES, REST), 0.0)
    waiting = {function: entry[2] for function, entry in stats.items()}
    for _ in range(PASSES):
        passed: dict[Function, float] = {}
        for function, seconds in waiting.items():
            phase, callers = phase_of(function[0]), _shares(function, stats)
            if phase or not callers:
                found[phase or REST] += seconds
            for caller, share in callers.items() if not phase else ():
                passed[caller] = passed.get(caller, 0.0) + share * seconds
        waiting = passed
    found[REST] += sum(waiting.values())
    return found


def phase_of(path: str) -> str:
    """The phase of a module, or empty for one that is not of ``fed_dpsat``."""
    module = path.rpartition("/fed_dpsat/")[2] if "/fed_dpsat/" in path else ""
    fits = [(len(start), name) for name, starts in PHASES.items() for start in starts if module.startswith(start)]
    return max(fits)[1] if fits else (REST if module else "")


def _shares(function: Function, stats: Mapping[Function, Any]) -> dict[Function, float]:
    """The share of each caller in the time of ``function`` with all that it calls."""
    times = {caller: entry[3] for caller, entry in stats[function][4].items() if caller != function}
    whole = sum(times.values())
    if whole > 0:
        return {caller: seconds / whole for caller, seconds in times.items()}
    return {caller: 1 / len(times) for caller in times}
