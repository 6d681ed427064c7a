"""Strategies with a client's half on skewed labels: python -m simulations.compare_halves writes docs/results/halves.md.

Every figure is of clients: accuracy of the model that a client would use, on its share of the public test split, which
has the labels of its training data. Learning rates and weights are each method's best of a grid, by seeds of their own.
About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fed_dpsat import RunConfig
from simulations.compare_personal import FIGURES, HERE, PARTITIONS, figures
from simulations.repeat import difference, kept, spread

BASE = RunConfig(
    model="mlp",
    optimizer="dp-sgd",
    num_clients=10,
    stack_clients=10,
    num_rounds=10,
    local_steps=5,
    target_epsilon=3.0,
    delta=1e-4,
)
LEARNING_RATES, MUS = (0.5, 1.0, 2.0), (0.1, 0.5)
TUNED_ON = 100
NO_WEIGHT = ("",)
WEIGHTS = tuple(f"mu = {mu}" for mu in MUS)
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one model for all (FedAvg)": ({}, NO_WEIGHT),
    "DP-SCAFFOLD": ({"strategy": "dp-scaffold"}, NO_WEIGHT),
    "private heads": ({"personal_layers": "head"}, NO_WEIGHT),
    "Ditto": ({"strategy": "ditto"}, WEIGHTS),
    "MR-MTL": ({"strategy": "mr-mtl"}, WEIGHTS),
    "each client alone (MR-MTL, mu = 0)": ({"strategy": "mr-mtl"}, ("mu = 0.0",)),
}


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results" / "halves.md")
    parser.add_argument("--keep", type=Path, help="JSON file of results; an interrupted run continues from it")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for partition, of_partition in reversed(PARTITIONS.items()):
        reference: dict[str, list[float]] = {}
        for method, (of_method, arguments) in METHODS.items():
            grid = [
                {**of_partition, **of_method, "lr": lr, **({"strategy_args": weight} if weight else {})}
                for lr in LEARNING_RATES
                for weight in arguments
            ]
            best = max(grid, key=lambda settings: _found(chosen.keep, settings, [TUNED_ON])[FIGURES[0]])
            found = _found(chosen.keep, best, range(chosen.seeds))
            reference = reference or found
            cells = [
                spread(found[key]) + ("" if found is reference else f"<br>{difference(found[key], reference[key])}")
                for key in FIGURES
            ]
            tuned = f"{best['lr']:g} | {best.get('strategy_args', '').removeprefix('mu = ')}"
            rows.append(f"| {partition} | {method} | {tuned} | " + " | ".join(cells) + " |")
    chosen.out.write_text(_table(rows, chosen.seeds))


def _found(keep: Path | None, settings: dict[str, Any], seeds: Iterable[int]) -> dict[str, list[float]]:
    def measure(seed: int) -> list[float]:
        values = {**BASE.settings(), **settings, "seed": seed, "evaluate_every": BASE.num_rounds}
        return figures(RunConfig.from_mapping(values))

    each = [kept(keep, f"{json.dumps(settings)}, seed {seed}", lambda seed=seed: measure(seed)) for seed in seeds]
    return {name: [values[i] for values in each] for i, name in enumerate(FIGURES)}


def _table(rows: list[str], n: int) -> str:
    rates, weights = ", ".join(f"{lr:g}" for lr in LEARNING_RATES), " and ".join(f"{mu:g}" for mu in MUS)
    text = f"""# Strategies with a client's half on skewed labels

`python -m simulations.compare_halves --seeds {n}`. The digits, ten clients, mlp (64-128-10), DP-SGD, {BASE.num_rounds}
rounds of {BASE.local_steps} steps, epsilon 3 at delta 1e-4 for **one example of one client**, against a server that
sees every update; Ditto has the noise of {2 * BASE.local_steps} steps a round. Percent, mean (sd) of seeds 0 to
{n - 1}, n = {n}; below it the mean difference to one model for all on the same seeds with its 95 % interval (Student's
t), bold where that leaves 0 out; intervals are not corrected for the number of comparisons. `lr` is the best of
{rates}, and `mu` the best of {weights}, for that method by accuracy on the seed {TUNED_ON}; their choice is not in
epsilon.

*accuracy*: of the model that a client would use (its own one, its own head on the shared part, or the global model), on
its share of the public test split, mean over clients, as in [private heads](personal.md). *worst decile*: the mean of
the lowest tenth of clients, here one client.

| labels | method | lr | mu | accuracy | worst decile |
|---|---|---|---|---|---|
"""
    return text + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
