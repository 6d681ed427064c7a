"""DP-FedAvg and the DP-FedSAM family, client by client: python -m simulations.compare_client_level.

Writes docs/results/client_level.md. The unit is ONE WHOLE CLIENT. Each method has its best learning rate and bound of a
grid, by seeds of their own. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fed_dpsat import RunConfig, simulate
from fed_dpsat.experiment import Experiment
from fed_dpsat.flower.personal import summarised
from simulations.compare_personal import client_accuracies
from simulations.repeat import difference, kept, spread

HERE = Path(__file__).parent
BASE = RunConfig.load(HERE / "dp_fedsam.toml", ["num_rounds=20", "evaluate_every=20"])
METHODS: dict[str, dict[str, Any]] = {
    "DP-FedAvg": {"optimizer": "dp-sgd", "local_steps": 5},
    "DP-FedSAM": {},
    "DP-FedSAM-top_k": {"keep_share": 0.4},
    "DP2-FedSAM": {"personal_layers": "head"},
}
GRID = {"lr": (0.3, 1.0), "clip_norm": (0.5, 1.0)}
TUNED_ON = (100,)
FIGURES = ("test_accuracy", "personal_accuracy", "personal_worst_decile")
OF_CLIENTS = "personal_accuracy"


def figures(config: RunConfig) -> list[float]:
    """Test accuracy, then mean and worst decile of clients' accuracies, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(config, f"{folder}/run")
        params = torch.load(f"{folder}/run/checkpoint/model.pt", weights_only=True)["params"]
    if not config.personal_layers:
        summary |= summarised(client_accuracies(Experiment.build(config), params))
    return [100 * summary[key] for key in FIGURES]


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results" / "client_level.md")
    parser.add_argument("--keep", type=Path, help="JSON file of what was measured; a cut-off run goes on there")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows, reference = [], {}
    for method, changes in METHODS.items():
        best = _best(chosen.keep, changes)
        found = _by_figure(chosen.keep, {**changes, **best}, range(chosen.seeds))
        reference = reference or found
        cells = [
            "" if method == "DP2-FedSAM" and key == "test_accuracy" else _cell(found[key], reference[key], method)
            for key in FIGURES
        ]
        said = ", ".join(f"`{key}={value}`" for key, value in changes.items()) or "`simulations/dp_fedsam.toml`"
        rows.append(f"| {method} | {said} | {best['lr']:g}, {best['clip_norm']:g} | " + " | ".join(cells) + " |")
    chosen.out.write_text(_table(rows, chosen.seeds))


def _cell(values: list[float], reference: list[float], method: str) -> str:
    return spread(values) + ("" if method == "DP-FedAvg" else f"<br>{difference(values, reference)}")


def _best(keep: Path | None, changes: dict[str, Any]) -> dict[str, float]:
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    return max(points, key=lambda p: statistics.mean(_by_figure(keep, {**changes, **p}, TUNED_ON)[OF_CLIENTS]))


def _by_figure(keep: Path | None, changes: dict[str, Any], seeds: Iterable[int]) -> dict[str, list[float]]:
    def measure(seed: int) -> list[float]:
        return figures(RunConfig.from_mapping({**BASE.settings(), **changes, "seed": seed}))

    found = [kept(keep, f"{json.dumps(changes)}, seed {seed}", lambda seed=seed: measure(seed)) for seed in seeds]
    return {name: [values[i] for values in found] for i, name in enumerate(FIGURES)}


def _table(rows: list[str], n: int) -> str:
    grid = " and ".join(f"{key} in {{{', '.join(f'{v:g}' for v in values)}}}" for key, values in GRID.items())
    last = n - 1
    text = f"""# Methods of the unit "client"

`python -m simulations.compare_client_level --seeds {n}`. Every figure is at **epsilon 8, delta 1e-3 for one whole
client** with all its examples (add-or-remove, PLD), against someone who sees every released model; the server is
trusted. None of them is to be compared with a table of the unit "example".

The digits, mlp, 100 clients of about 14 images with labels by Dirichlet(0.3), each in a round by a coin of 0.2, 20
rounds. Five local descents a round: `sam` needs two calls for each. rho 0.05. Percent, mean (sd) of seeds 0 to {last},
n = {n}; below it the mean difference to DP-FedAvg on the same seeds with its 95 % interval (Student's t), bold where
that leaves 0 out; intervals are not corrected for the number of comparisons. Each method has the best of {grid}
by clients' accuracy on seed {TUNED_ON[0]} alone; the choice is not in epsilon.

*test*: of the global model on the test split; DP2-FedSAM has none, its heads are the clients'. *clients*: of the
model that a client would use, on its share of the test split (dealt by label as [personal.md](personal.md) says),
mean over clients that have one; *worst decile* of the same. A client's own head has no noise in this unit, and its
accuracy is not covered by epsilon.

| method | settings | lr, clip_norm | test | clients | worst decile |
|---|---|---|---|---|---|
"""
    return text + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
