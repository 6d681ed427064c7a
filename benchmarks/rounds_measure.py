"""The contestants of a comparison take turns; each contestant that completes its rounds gives a row."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from benchmarks.rounds_contestants import Setting
from benchmarks.turns import Contestant, ContestantError

Row = dict[str, str | int | float | None]

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant: how its row is labelled, how its process is started, how many rounds of it are measured.

    ``warm_up`` is of rounds before them.
    """

    labels: Row
    command: Sequence[str]
    rounds: int
    warm_up: int = 1
    env: Mapping[str, str] = field(default_factory=dict)


def entry(
    work: str, engine: str, contestant: str, setting: Setting, *, warm_up: int = 1, **labels: str | float
) -> Entry:
    """One of ``benchmarks.rounds_contestants``; ``setting.rounds`` are those measured, ``warm_up`` more come before."""
    warmed = dataclasses.replace(setting, rounds=setting.rounds + warm_up)
    text = json.dumps(dataclasses.asdict(warmed))
    row: Row = {"work": work, "engine": engine, "clients": setting.cohort or setting.clients}
    return Entry(
        labels={**row, "model_mb": setting.model_mb, "workers": setting.workers, **labels},
        command=[sys.executable, "-m", "benchmarks.rounds_contestants", contestant, text],
        rounds=setting.rounds,
        warm_up=warm_up,
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A contestant that lasted: seconds of each of its measured turns, on the clock and of its processor."""

    labels: Row
    times: Sequence[float]
    cpu: Sequence[float]
    memory: Row

    def row(self, **more: float) -> Row:
        """The medians of all turns, and the other values of a contestant."""
        median = statistics.median(self.times)
        return {
            **self.labels,
            "rounds": len(self.times),
            "seconds_per_round": round(median, 4),
            "slowest_seconds": round(max(self.times), 4),
            "ms_per_client": round(1000 * median / self.clients, 4),
            "parent_cpu_seconds": round(statistics.fmean(self.cpu), 4),
            **self.memory,
            **more,
        }

    @property
    def clients(self) -> int:
        """The number of clients of a round."""
        clients = self.labels["clients"]
        assert isinstance(clients, int)
        return clients

    @property
    def in_process(self) -> bool:
        """Whether the process that drives it did all its work."""
        return self.labels["workers"] == 0


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median over turns of the ratio of ``one`` to ``other`` in the same turn, under equal load."""
    return round(statistics.median(a / b for a, b in zip(one, other, strict=False)), 3)


def measure(entries: Sequence[Entry], timeout: float) -> list[Measured]:
    """The contestants that completed their rounds, in order; they take turns, and the first one changes each time."""
    running: dict[int, Contestant] = {}
    warm: dict[int, float] = {}
    times: dict[int, list[float]] = {i: [] for i in range(len(entries))}
    clocks: dict[int, list[float]] = {}

    @contextmanager
    def or_left_out(i: int) -> Iterator[None]:
        try:
            yield
        except ContestantError as error:
            print(f"{entries[i].labels} is left out: {error}", file=sys.stderr)
            if i in running:
                running.pop(i).end()

    def measured(i: int) -> Measured:
        cpu = [after - before for before, after in pairwise(clocks[i])]
        return Measured(labels=entries[i].labels, times=times[i], cpu=cpu, memory=_memory(running[i], warm[i]))

    order = list(range(len(entries)))
    try:
        for i in order:
            with or_left_out(i):
                running[i] = Contestant(entries[i].command, {**QUIET, **entries[i].env}, timeout)
                for _ in range(entries[i].warm_up):
                    running[i].round()
                warm[i], clocks[i] = running[i].memory_mb("VmRSS"), [running[i].cpu_seconds()]
        for round in range(1, max((one.rounds for one in entries), default=0) + 1):
            order = order[1:] + order[:1]
            for i in [i for i in order if i in running and round <= entries[i].rounds]:
                with or_left_out(i):
                    times[i].append(running[i].round())
                    clocks[i].append(running[i].cpu_seconds())
        return [measured(i) for i in sorted(running)]
    finally:
        for contestant in running.values():
            contestant.end()


def _memory(contestant: Contestant, warm: float) -> Row:
    return {
        "parent_mb": round(contestant.memory_mb("VmHWM"), 1),
        "growth_mb": round(contestant.memory_mb("VmRSS") - warm, 1),
        "start_seconds": round(contestant.start_seconds, 2),
    }


def table(rows: list[Row]) -> str:
    """Rows as Markdown; columns are all keys that a row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines)
