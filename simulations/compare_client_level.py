"""DP-FedAvg and the DP-FedSAM family, client by client: python -m simulations.compare_client_level.

Writes docs/results/client_level.md. The unit is ONE WHOLE CLIENT. All methods have the learning rate and the bound of
simulations/dp_fedsam.toml; none was tuned. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fed_dpsat import RunConfig, simulate
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.personal import summarised
from fed_dpsat.tasks.classification import METRICS
from simulations.compare_personal import client_accuracies
from simulations.repeat import difference, kept, spread

HERE = Path(__file__).parent
BASE = RunConfig.load(HERE / "dp_fedsam.toml", ["num_rounds=10", "evaluate_every=10", "local_steps=6"])
METHODS: dict[str, dict[str, Any]] = {
    "DP-FedAvg": {"optimizer": "dp-sgd", "local_steps": 3},
    "DP-FedSAM": {},
    "DP-FedSAM-top_k": {"keep_share": 0.4},
    "DP2-FedSAM": {"personal_layers": "head"},
}
FIGURES = ("test_accuracy", "personal_accuracy", "personal_worst_decile")


def figures(config: RunConfig) -> list[float]:
    """Test accuracy, then mean and worst decile of clients' accuracies, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(config, f"{folder}/run")
        params = torch.load(f"{folder}/run/checkpoint/model.pt", weights_only=True)["params"]
    if not config.personal_layers:
        summary |= summarised(client_accuracies(Experiment.build(config), params), METRICS[0])
    return [100 * summary[key] for key in FIGURES]


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results" / "client_level.md")
    parser.add_argument("--keep", type=Path, help="JSON file of results; an interrupted run continues from it")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows, reference = [], {}
    for method, changes in METHODS.items():
        found = _by_figure(chosen.keep, changes, range(chosen.seeds))
        reference = reference or found
        cells = [
            "" if method == "DP2-FedSAM" and key == "test_accuracy" else _cell(found[key], reference[key], method)
            for key in FIGURES
        ]
        said = ", ".join(f"`{key}={value}`" for key, value in changes.items()) or "`simulations/dp_fedsam.toml`"
        rows.append(f"| {method} | {said} | " + " | ".join(cells) + " |")
    chosen.out.write_text(_table(rows, chosen.seeds))


def _cell(values: list[float], reference: list[float], method: str) -> str:
    return spread(values) + ("" if method == "DP-FedAvg" else f"<br>{difference(values, reference)}")


def _by_figure(keep: Path | None, changes: dict[str, Any], seeds: Iterable[int]) -> dict[str, list[float]]:
    def measure(seed: int) -> list[float]:
        return figures(RunConfig.from_mapping({**BASE.settings(), **changes, "seed": seed}))

    found = [kept(keep, f"{json.dumps(changes)}, seed {seed}", lambda seed=seed: measure(seed)) for seed in seeds]
    return {name: [values[i] for values in found] for i, name in enumerate(FIGURES)}


def _table(rows: list[str], n: int) -> str:
    last = n - 1
    text = f"""# Methods of the unit "client"

`python -m simulations.compare_client_level --seeds {n}`. Every figure is at **epsilon 8, delta 1e-3 for one whole
client** with all its examples (add-or-remove, PLD), against an observer who sees every released model; the server is
trusted. None of them is to be compared with a table of the unit "example".

The digits, mlp, 100 clients of about 14 images with labels by Dirichlet(0.3), each in a round by a coin of 0.2, 10
rounds. Three local descents a round: `sam` needs two calls for each. lr 0.3, clip_norm 0.5, rho 0.05 for all; the first
two were the best of four pairs for DP-FedAvg in longer runs on seed 100, and nothing was tuned for the others. Percent,
mean (sd) of seeds 0 to {last}, n = {n}; below it the mean difference to DP-FedAvg on the same seeds with its 95 %
interval (Student's t), bold where that leaves 0 out; intervals are not corrected for the number of comparisons.

*test*: of the global model on the test split; DP2-FedSAM has none, its heads are the clients'. *clients*: of the
model that a client would use, on its share of the test split (dealt by label as [personal.md](personal.md) says),
mean over clients that have one; *worst decile* of the same. A client's own head has no noise in this unit, and its
accuracy is not covered by epsilon.

| method | settings | test | clients | worst decile |
|---|---|---|---|---|
"""
    return text + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
