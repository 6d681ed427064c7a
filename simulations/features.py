"""Accuracy of models on scattering features at epsilon 1 to 3: python -m simulations.features --data FOLDER --out FILE

Claim: a linear model on public features reaches in minutes of one core what networks of pixels do not reach. Settings
are chosen by one seed on a tenth of the training examples (``validation_share``), and reported on the test split with
five other seeds, at delta 1e-5 by PLD. Each finished run is a row of the CSV file at once; the same command continues.
FOLDER has a root of torchvision, ``fashion-mnist``, and Parquet files, ``cifar10``. ``--only`` takes parts of names.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import itertools
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fed_dpsat import RunConfig, simulate

HERE = Path(__file__).resolve().parent
KEY = ("study", "arm", "phase", "seed", "settings")
FIELDS = (*KEY, "accuracy", "averaged_accuracy", "loss", "epsilon", "noise_multiplier", "seconds")
TUNED_ON = 1000
SEEDS, PAIRS = 5, 8
SOURCES = {"fashion-mnist": "torchvision", "cifar10": "parquet"}

Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A preset, and for each arm the candidates of which validation examples choose one."""

    preset: str
    arms: dict[str, list[Settings]]
    seeds: int = SEEDS
    name: str = ""

    @property
    def called(self) -> str:
        """The name in the file of results."""
        return self.name or self.preset


def grid(**values: list[Any]) -> list[Settings]:
    """All combinations."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def linear(dataset: str, clients: int) -> list[Settings]:
    """Candidates of a linear model: sample rate, rounds and learning rate."""
    scale = 1.0 if dataset == "fashion-mnist" else 0.5
    batches: list[tuple[float, int, tuple[float, ...]]]
    if clients == 1:
        batches = [(0.1365, 29, (8.0, 16.0))]
    else:
        batches = [(0.1365, 290, (2.0, 4.0)), (0.5, 120, (4.0, 8.0, 16.0)), (1.0, 80, (8.0, 16.0))]
    return [
        {"sample_rate": rate, "num_rounds": rounds, "lr": lr * scale} for rate, rounds, lrs in batches for lr in lrs
    ]


def studies() -> Iterator[Study]:
    """The tables, the shorter ones first; then DP-SAT against DP-SGD by pairs of seeds."""
    for dataset, clients in (("fashion-mnist", 1), ("fashion-mnist", 10)):
        for epsilon in (2, 1, 3):
            yield Study(preset=named(dataset, clients, epsilon), arms={"linear": linear(dataset, clients)})
    yield from against("fashion-mnist")
    for clients in (1, 10):
        for epsilon in (3, 2, 1):
            yield Study(preset=named("cifar10", clients, epsilon), arms={"linear": linear("cifar10", clients)})


def against(dataset: str) -> Iterator[Study]:
    """Equal budgets of four candidates: DP-SGD has four learning rates, DP-SAT two of them with two radii."""
    for clients, model, lrs in (
        (1, "linear", [8.0, 12.0, 16.0, 24.0]),
        (1, f"scattering-cnn-{dataset}", [1.0, 2.0, 4.0, 8.0]),
        (10, "linear", [2.0, 4.0, 8.0, 16.0]),
    ):
        sgd = {"optimizer": "dp-sgd", "model": model}
        sat = {"optimizer": "dp-sat-momentum", "model": model}
        arms = {
            "dp-sgd": [{**sgd, "lr": lr} for lr in lrs],
            "dp-sat": [{**sat, "lr": lr, "rho": rho} for lr in lrs[1:3] for rho in (0.03, 0.1)],
        }
        preset = named(dataset, clients, 2)
        yield Study(preset=preset, name=f"{preset}-{model}-against", arms=arms, seeds=PAIRS)


def named(dataset: str, clients: int, epsilon: int) -> str:
    """The name of a preset."""
    return f"{dataset}-{clients}-client{'s' if clients > 1 else ''}-epsilon-{epsilon}"


class Results:
    """The rows of a CSV file, by study, arm, phase, seed and settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        if path.exists():
            with path.open(newline="") as file:
                self.rows = {self.key(row): row for row in csv.DictReader(file)}

    @staticmethod
    def key(row: dict[str, Any]) -> tuple[str, ...]:
        """What a row is found by."""
        return tuple(str(row[name]) for name in KEY)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row at once."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows[self.key(row)] = {name: str(value) for name, value in row.items()}


def scores(row: dict[str, Any]) -> dict[str, float]:
    """The accuracy of the last model and of the average of models."""
    return {name: float(row[name]) for name in ("accuracy", "averaged_accuracy")}


def measured(
    results: Results, study: Study, arm: str, phase: str, seed: int, settings: Settings, data: Path
) -> dict[str, float]:
    """The accuracies of one run, from the file or from a run that is then in it."""
    row: dict[str, Any] = {"study": study.called, "arm": arm, "phase": phase, "seed": seed}
    row["settings"] = json.dumps(settings, sort_keys=True)
    if known := results.rows.get(Results.key(row)):
        return scores(known)
    dataset = study.preset.partition("-1")[0]
    base = RunConfig.load(HERE.parent / "presets" / f"{study.preset}.toml")
    config = dataclasses.replace(
        base,
        **settings,
        data_source=SOURCES[dataset],
        data_path=str(data / dataset),
        seed=seed,
        validation_share=0.1 if phase == "validation" else 0.0,
        evaluate_every=10**6,
    )
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = simulate(config, f"{folder}/run", progress=False)
    gc.collect()  # the features that validation examples leave are copies
    row |= {"accuracy": round(100 * run["test_accuracy"], 3), "loss": round(run["test_loss"], 5)}
    row["averaged_accuracy"] = round(100 * run["averaged_test_accuracy"], 3)
    row |= {"epsilon": round(run["epsilon"], 4), "noise_multiplier": round(run["noise_multiplier"], 5)}
    results.add({**row, "seconds": round(time.process_time() - began, 1)})
    return scores(row)


def main() -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results" / "features.csv")
    parser.add_argument("--only", default="", help="part of the name of a study")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = Results(chosen.out)
    for study in studies():
        if chosen.only not in study.called:
            continue
        for arm, candidates in study.arms.items():
            tried = [measured(results, study, arm, "validation", TUNED_ON, one, chosen.data) for one in candidates]
            _, kind, place = max((one[kind], kind, place) for place, one in enumerate(tried) for kind in one)
            best = candidates[place]
            found = [
                measured(results, study, arm, "test", seed, best, chosen.data)[kind] for seed in range(study.seeds)
            ]
            print(study.called, arm, kind, best, f"{statistics.mean(found):.2f} %", found, flush=True)


if __name__ == "__main__":
    main()
