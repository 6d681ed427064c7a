"""Correlated noise in fixed cohorts of 100 of 1,000 clients: python -m simulations.compare_correlated --data DIR.

Claim to test: at the same epsilon, noise that later rounds cancel (BandMF, BLT) gives better models than independent
noise, if a client takes part 10 times in 100 rounds, 10 rounds apart. The unit is ONE WHOLE CLIENT. Fashion-MNIST,
Dirichlet 0.3, a linear model (7,850 parameters). The bound of a client's change is the step size here, since signal and
noise scale with it, so it is chosen from GRID for each noise and epsilon with a seed of its own, on the test split.

Writes one row per run to a CSV file at once, and skips the rows that are there. DIR is a root of
torchvision.datasets (simulations/methods_fashion_mnist.toml says how to get it).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import logging
from pathlib import Path

import torch

from fed_dpsat import RunConfig
from simulations.repeat import accuracies, difference, spread

BASE = RunConfig(
    dataset="fashion_mnist",
    data_source="torchvision",
    partition="dirichlet",
    dirichlet_alpha=0.3,
    num_clients=1000,
    clients_per_round=100,
    num_rounds=100,
    max_rounds_per_client=10,
    min_separation=10,
    privacy_unit="client",
    optimizer="dp-sgd",
    lr=0.5,
    local_steps=2,
    sample_rate=1.0,
    target_epsilon=1.0,
    delta=1e-5,
    stack_clients=0,
)
NOISES = ("independent", "band-mf", "blt")
EPSILONS = (1.0, 4.0, 8.0)
GRID = (0.1, 0.3, 1.0, 3.0)
TUNING_SEED = 1000
FIELDS = ("epsilon", "noise", "clip_norm", "seed", "accuracy")

Rows = dict[tuple[float, str, float, int], float]


def main() -> None:
    """Run all rows that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="root of torchvision.datasets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=Path, default=Path("compare_correlated.csv"))
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    base = dataclasses.replace(BASE, data_path=chosen.data)
    rows = _read(chosen.rows)
    for epsilon in EPSILONS:
        found: dict[str, list[float]] = {}
        for noise in NOISES:
            run = dataclasses.replace(base, target_epsilon=epsilon, noise_mechanism=noise)
            tuned = {bound: _measured(rows, chosen.rows, run, bound, TUNING_SEED) for bound in GRID}
            bound = max(tuned, key=lambda one: tuned[one])
            found[noise] = [_measured(rows, chosen.rows, run, bound, seed) for seed in range(chosen.seeds)]
            said = "" if noise == NOISES[0] else f"; {difference(found[noise], found[NOISES[0]])}"
            print(f"epsilon {epsilon:g}, {noise}, clip_norm {bound}: {spread(found[noise])}{said}", flush=True)


def _measured(rows: Rows, path: Path, run: RunConfig, bound: float, seed: int) -> float:
    """The accuracy in percent, from ``rows`` or from a run, whose row is then written."""
    key = run.target_epsilon, run.noise_mechanism, bound, seed
    if key not in rows:
        (rows[key],) = accuracies(run, [seed], clip_norm=bound)
        with path.open("a", newline="") as file:
            csv.writer(file).writerow([*key, f"{rows[key]:.3f}"])
    return rows[key]


def _read(path: Path) -> Rows:
    if not path.exists():
        path.write_text(",".join(FIELDS) + "\n")
    with path.open(newline="") as file:
        return {
            (float(row["epsilon"]), row["noise"], float(row["clip_norm"]), int(row["seed"])): float(row["accuracy"])
            for row in csv.DictReader(file)
        }


if __name__ == "__main__":
    main()
