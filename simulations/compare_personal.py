"""The effect of private heads on skewed labels: python -m simulations.compare_personal writes docs/results/personal.md.

Every figure is of clients: accuracy of the model that a client would use, on its share of the public test split, which
has the labels of its training data. Learning rates are each method's best of four, by seeds of their own. About five
minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fed_dpsat import RunConfig, simulate
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import evaluation_of, predict
from fed_dpsat.client.personal import summarised
from fed_dpsat.tasks.classification import METRICS
from simulations.repeat import difference, kept, spread

HERE = Path(__file__).parent
BASE = RunConfig(model="mlp", num_clients=10, num_rounds=30, target_epsilon=3.0, delta=1e-4)
PARTITIONS: dict[str, dict[str, Any]] = {
    "Dirichlet(0.1)": {"partition": "dirichlet", "dirichlet_alpha": 0.1},
    "two classes a client": {"partition": "shards", "classes_per_client": 2},
}
METHODS = {
    "one model for all": "",
    "private heads": "head",
    "private but for 128 biases": "1.weight, 3",
}
LEARNING_RATES = (0.5, 1.0, 2.0, 4.0)
TUNED_ON = (100, 101)
FIGURES = ("personal_accuracy", "personal_worst_decile")


def figures(config: RunConfig) -> list[float]:
    """Mean and worst decile over clients after the last round, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(config, f"{folder}/run")
        if FIGURES[0] in summary:
            found = summary
        else:
            params = torch.load(f"{folder}/run/checkpoint/model.pt", weights_only=True)["params"]
            found = summarised(client_accuracies(Experiment.build(config), params), METRICS[0])
    return [100 * found[key] for key in FIGURES]


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results" / "personal.md")
    parser.add_argument("--keep", type=Path, help="JSON file of results; an interrupted run continues from it")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for partition, of_partition in PARTITIONS.items():
        reference: dict[str, list[float]] = {}
        for method, layers in METHODS.items():
            settings = {**of_partition, "personal_layers": layers}
            lr = _best(chosen.keep, partition, method, settings)
            found = _by_figure(chosen.keep, f"{partition}, {method}", {**settings, "lr": lr}, range(chosen.seeds))
            reference = reference or found
            cells = [
                spread(found[key]) + ("" if found is reference else f"<br>{difference(found[key], reference[key])}")
                for key in FIGURES
            ]
            rows.append(f"| {partition} | {method} | {lr:g} | " + " | ".join(cells) + " |")
    chosen.out.write_text(_table(rows, chosen.seeds))


def _best(keep: Path | None, partition: str, method: str, settings: dict[str, Any]) -> float:
    def mean(lr: float) -> float:
        return statistics.mean(
            _by_figure(keep, f"tune {partition}, {method}", {**settings, "lr": lr}, TUNED_ON)[FIGURES[0]]
        )

    return max(LEARNING_RATES, key=mean)


def _by_figure(keep: Path | None, key: str, settings: dict[str, Any], seeds: Iterable[int]) -> dict[str, list[float]]:
    def measure(seed: int) -> list[float]:
        values = {**BASE.settings(), **settings, "seed": seed, "evaluate_every": BASE.num_rounds}
        return figures(RunConfig.from_mapping(values))

    found = [
        kept(keep, f"{key}, {json.dumps(settings)}, seed {seed}", lambda seed=seed: measure(seed)) for seed in seeds
    ]
    return {name: [values[i] for values in found] for i, name in enumerate(FIGURES)}


def client_accuracies(experiment: Experiment, params: dict[str, torch.Tensor]) -> dict[int, float]:
    """Of one model for all, on each client's share of the public test split."""
    test, module = experiment.dataset.test, experiment.loss_fn.module
    shares = enumerate(experiment.test_shares)
    return {
        client: evaluation_of(predict(module, params, test.rows(torch.from_numpy(share)))).accuracy
        for client, share in shares
        if len(share)
    }


def _table(rows: list[str], n: int) -> str:
    rates = ", ".join(f"{lr:g}" for lr in LEARNING_RATES)
    text = f"""# Private heads on skewed labels

`python -m simulations.compare_personal --seeds {n}`. The digits, ten clients, mlp (64-128-10, the head is its last
layer), DP-SAT, 30 rounds of one step, epsilon 3 at delta 1e-4 for **one example of one client**, against a server that
sees every update. Percent, mean (sd) of seeds 0 to {n - 1}, n = {n}; below it the mean difference to one model for all
on the same seeds with its 95 % interval (Student's t), bold where that leaves 0 out; intervals are not corrected for
the number of comparisons. `lr` is the best of {rates} for that method by mean accuracy on the seeds {TUNED_ON[0]} and
{TUNED_ON[1]}; its choice is not in epsilon.

*accuracy*: of the model that a client would use (its own head on the shared part, or the global model), on its share of
the public test split, mean over clients. Each class of the test split is dealt in proportion to the training examples
of that class that clients hold: a share has its client's labels, and a model that knows no others is not marked down.
*worst decile*: the mean of the lowest tenth of clients, here one client. *private but for 128 biases*: all weights stay
on the client, so it is nearly no federation.

| labels | method | lr | accuracy | worst decile |
|---|---|---|---|---|
"""
    return text + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
