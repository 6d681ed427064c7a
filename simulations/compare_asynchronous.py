"""Simulated time until a test accuracy: whole cohorts against FedBuff, on the digits with lognormal delays.

``python -m simulations.compare_asynchronous --seeds 3``. Every run asks for as many local trainings, 600, at one noise;
epsilon is that of the client that was drawn most often.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

TARGET = 0.8
COMMON: dict[str, Any] = {
    **{"num_clients": 50, "clients_per_round": 20, "delay": "lognormal", "delay_mean": 10.0},
    **{"noise_multiplier": 2.0, "delta": 1e-4, "max_rounds_per_client": 30},
}
WAYS: dict[str, dict[str, Any]] = {
    "whole cohorts of 20": {"num_rounds": 30},
    "FedBuff, buffer 10": {"num_rounds": 60, "buffer_size": 10},
    "FedBuff, buffer 5": {"num_rounds": 120, "buffer_size": 5},
}


def measure(way: str, seed: int) -> dict[str, float]:
    """Final test accuracy, epsilon, simulated seconds in all and until ``TARGET`` (NaN if it is never reached)."""
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(RunConfig(**COMMON, **WAYS[way], seed=seed), Path(folder) / "run")
        rounds = [json.loads(line) for line in (Path(folder) / "run" / "rounds.jsonl").read_text().splitlines()][1:]
    reached = [line["simulated_seconds"] for line in rounds if line["test_accuracy"] >= TARGET]
    return {
        "accuracy": summary["test_accuracy"],
        "epsilon": summary["epsilon"],
        "seconds": rounds[-1]["simulated_seconds"],
        "seconds to target": min(reached, default=float("nan")),
    }


def main() -> None:
    """Print the table: mean and standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    for way in WAYS:
        rows = [measure(way, seed) for seed in seeds]
        cells = {name: [row[name] for row in rows] for name in rows[0]}
        print(way, *(f"{name} {mean(v):.3f} (sd {stdev(v):.3f})" for name, v in cells.items()), sep="; ", flush=True)


if __name__ == "__main__":
    main()
