"""``python -m benchmarks.start``: from shell to exit, in ratios to the imports that a private run cannot do without.

Commands take turns, each in a process of its own. Python keeps compiled modules in a folder of this benchmark, which
an untimed first turn fills, as an installation has them. Processor seconds are those of all threads. ``--against`` has
the checkout of another version take turns too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = "import torch, flwr.serverapp, dp_accounting.pld"
RUN = "run simulations/digits_dpsat.toml"
COMMANDS = (RUN, "list", "ledger --help", "calibrate --help", "--version")
LEAST_TURNS = 7


def timed(command: Sequence[str], tree: Path, env: Mapping[str, str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of one process; raises ``CalledProcessError`` if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=tree, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, usage.ru_utime + usage.ru_stime


def measure(trees: Mapping[str, Path], turns: int) -> list[dict[str, Any]]:
    """One row per command and tree; the first has the imports alone."""
    contestants = {("imports", ""): (["-c", IMPORTS], ROOT)}
    for name, tree in trees.items():
        contestants |= {(command, name): (["-m", "fed_dpsat", *command.split()], tree) for command in COMMANDS}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in contestants}
    with tempfile.TemporaryDirectory() as folder:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        env = {**kept, "PYTHONPYCACHEPREFIX": f"{folder}/compiled"}
        for turn in range(turns + 1):
            for (command, name), (arguments, tree) in contestants.items():
                out = ["--out", f"{folder}/{turn}{name}"] if command == RUN else []
                seconds = timed([sys.executable, *arguments, *out], tree, env)
                if turn:
                    found[command, name].append(seconds)
    rows = []
    for (command, name), times in found.items():
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append({"command": command, "tree": name, "seconds": wall, "processor_seconds": processor})
    return [
        {
            **row,
            "ratio": row["seconds"] / rows[0]["seconds"],
            "processor_ratio": row["processor_seconds"] / rows[0]["processor_seconds"],
        }
        for row in rows
    ]


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=LEAST_TURNS)
    parser.add_argument("--against", type=Path, help="root of a checkout of another version")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    trees = {"": ROOT, **({"against": given.against.resolve()} if given.against else {})}
    rows = measure(trees, given.turns)
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    print("| command | seconds | of imports | processor seconds | of imports |\n|---|---|---|---|---|")
    for row in rows:
        name = row["command"] if row is rows[0] else f"`fed-dpsat {row['command']}`"
        print(
            f"| {name}{', ' if row['tree'] else ''}{row['tree']} | {row['seconds']:.2f} | {row['ratio']:.2f} "
            f"| {row['processor_seconds']:.2f} | {row['processor_ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
