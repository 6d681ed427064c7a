"""Contestants of one comparison take turns; each that lasts leaves a row."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.rounds_contestants import Setting
from benchmarks.turns import Contestant, ContestantError

Row = dict[str, str | int | float | None]
CPU = "parent_cpu_seconds"

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant: how its row is labelled, how its process is started, how many rounds of it are measured."""

    labels: Row
    command: Sequence[str]
    rounds: int
    env: Mapping[str, str] = field(default_factory=dict)


def entry(work: str, engine: str, contestant: str, setting: Setting, **labels: str | float) -> Entry:
    """One of ``benchmarks.rounds_contestants``; ``setting.rounds`` are those measured, one more warms up."""
    warmed = dataclasses.replace(setting, rounds=setting.rounds + 1)
    text = json.dumps(dataclasses.asdict(warmed))
    row: Row = {"work": work, "engine": engine, "clients": setting.cohort or setting.clients}
    return Entry(
        labels={**row, "model_mb": setting.model_mb, "workers": setting.workers, **labels},
        command=[sys.executable, "-m", "benchmarks.rounds_contestants", contestant, text],
        rounds=setting.rounds,
    )


def measure(entries: Sequence[Entry], timeout: float) -> list[Row]:
    """One row per contestant that lasted; those of one call take turns."""
    running: dict[int, Contestant] = {}
    warm: dict[int, tuple[float, float]] = {}
    times: dict[int, list[float]] = {i: [] for i in range(len(entries))}

    def attempt(i: int, round: int) -> None:
        try:
            if i not in running:
                running[i] = Contestant(entries[i].command, {**QUIET, **entries[i].env}, timeout)
            times[i].append(running[i].round())
            if not round:
                warm[i] = running[i].memory_mb("VmRSS"), running[i].cpu_seconds()
        except ContestantError as error:
            print(f"{entries[i].labels} is left out: {error}", file=sys.stderr)
            if i in running:
                running.pop(i).end()

    try:
        for i in range(len(entries)):
            attempt(i, 0)
        for round in range(1, max((one.rounds for one in entries), default=0) + 1):
            for i in [i for i in running if round <= entries[i].rounds]:
                attempt(i, round)
        return [_row(entries[i], running[i], warm[i], times[i][1:]) for i in running]
    finally:
        for contestant in running.values():
            contestant.end()


def _row(one: Entry, contestant: Contestant, warm: tuple[float, float], times: list[float]) -> Row:
    median = statistics.median(times)
    clients = one.labels["clients"]
    assert isinstance(clients, int)
    return {
        **one.labels,
        "rounds": len(times),
        "seconds_per_round": round(median, 4),
        "slowest_seconds": round(max(times), 4),
        "ms_per_client": round(1000 * median / clients, 4),
        CPU: round((contestant.cpu_seconds() - warm[1]) / len(times), 4),
        "parent_mb": round(contestant.memory_mb("VmHWM"), 1),
        "growth_mb": round(contestant.memory_mb("VmRSS") - warm[0], 1),
        "start_seconds": round(contestant.start_seconds, 2),
    }


def seconds(row: Row, key: str = "seconds_per_round") -> float:
    """A number of seconds in a row."""
    value = row[key]
    assert isinstance(value, float)
    return value


def table(rows: list[Row]) -> str:
    """Rows as Markdown; columns are all keys that a row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines)
