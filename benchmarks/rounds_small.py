"""Small clients, ``python -m benchmarks.rounds --small``: this build, the stacked loop, an earlier build and others.

A row of each contestant, for each model, number of local steps and cohort. ``ratio_to_loop`` is its time over that of
the hand-written loop, ``speedup`` the time of the earlier build over its own: medians of those of each turn. Those that
begin with ``cpu`` are of the processor time of the process alone, which other load hardly changes; that of stock Flower
leaves out its Ray worker.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import rounds_small_run
from benchmarks.rounds_contestants import Setting
from benchmarks.rounds_measure import Entry, Measured, Row, entry, measure, ratio, table
from benchmarks.rounds_plugins import small_images

STACK, LOOP_STACK = 0, 100
"""``stack_clients`` of this build if ``--stack`` gives none, and that of the loop."""

MAX_ROUNDS = 3
"""Measured of the earlier build and of stock Flower."""


def small(args: argparse.Namespace, max_flower_clients: int) -> list[Row]:
    """The rows; stock Flower is left out above ``max_flower_clients``, pfl without ``args.pfl_python``."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, steps, clients in itertools.product(args.small_models, args.small_steps, args.small_cohorts):
            setting = Setting(clients=clients, rounds=args.rounds, model=model, local_steps=steps)
            short = dataclasses.replace(setting, rounds=min(args.rounds, MAX_ROUNDS))
            entries = [
                _entry("ours", "ours-small", dataclasses.replace(setting, stack=n)) for n in args.stack or [STACK]
            ]
            entries.append(_entry("loop", "stacked-loop", dataclasses.replace(setting, stack=LOOP_STACK)))
            if args.before:
                entries.append(_earlier(args.before, short))
            if "flower" in args.against and clients <= max_flower_clients:
                entries.append(_entry("flower", "flower-small", short))
            if "pfl" in args.against and args.pfl_python:
                entries.append(_pfl(args.pfl_python, Path(folder) / f"{clients}.npz", setting))
            found = _compared(measure(entries, args.timeout))
            print(table(found), file=sys.stderr)  # a run takes long, and may be ended before the last one
            rows += found
    return rows


def _entry(engine: str, contestant: str, setting: Setting) -> Entry:
    labels = {"model": setting.model, "local_steps": setting.local_steps, "stack": setting.stack}
    return entry("small", engine, contestant, setting, **labels)


def _earlier(checkout: str, setting: Setting) -> Entry:
    """The build in the folder ``checkout``, whose clients train one after the other."""
    one = _entry("before", "", dataclasses.replace(setting, stack=1))
    given = {name: getattr(setting, name) for name in ("clients", "model", "local_steps")}
    text = json.dumps({**given, "rounds": setting.rounds + one.warm_up, "stack": 1})
    command = [sys.executable, str(Path(rounds_small_run.__file__).resolve()), text]
    return dataclasses.replace(one, command=command, env={"PYTHONPATH": str(Path(checkout).resolve())})


def _pfl(python: str, data: Path, setting: Setting) -> Entry:
    if not data.exists():
        inputs, labels = small_images(setting.clients).train.of_classes("pfl")
        np.savez(data, inputs=inputs.numpy(), labels=labels.numpy())
    one = _entry("pfl", "", setting)
    arguments = [str(data), str(setting.clients), str(setting.rounds + one.warm_up), setting.model]
    return dataclasses.replace(
        one, command=[python, "-m", "benchmarks.pfl_small", *arguments, str(setting.local_steps)]
    )


def _compared(measured: list[Measured]) -> list[Row]:
    loop, before = (
        next((each for each in measured if each.labels["engine"] == engine), None) for engine in ("loop", "before")
    )
    rows = []
    for each in measured:
        row = each.row()
        row["clients_per_second"] = round(each.clients / statistics.median(each.times))
        row["ratio_to_loop"] = ratio(each.times, loop.times) if loop else None
        row["speedup"] = ratio(before.times, each.times) if before else None
        row["cpu_ratio_to_loop"] = ratio(each.cpu, loop.cpu) if loop else None
        row["cpu_speedup"] = ratio(before.cpu, each.cpu) if before else None
        rows.append(row)
    return rows
