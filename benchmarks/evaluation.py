"""Time of an evaluation by clients: ``python -m benchmarks.evaluation [--clients N] [--model NAME]``.

The bare loop passes the same held-out examples client by client and adds up hits and losses. Best of five, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.client.build import Experiment
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.flower.private_evaluation import PrivateEvaluation
from fed_dpsat.flower.roster import Roster
from fed_dpsat.params import Params
from fed_dpsat.settings.config import RunConfig


def made_up(clients: int, rows: int) -> Dataset:
    """Ten classes of 28 x 28 pixels, ``rows`` for each client."""
    generator = np.random.default_rng(0)

    def split(count: int) -> Examples:
        pixels = torch.from_numpy(generator.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8))
        labels = torch.from_numpy(generator.integers(0, 10, count))
        return Examples(inputs=pixels, labels=labels, mean=(0.5,), std=(0.5,))

    return Dataset(name="made up", train=split(clients * rows), test=split(10), class_names=tuple(map(str, range(10))))


def bare(experiment: Experiment, params: Params) -> float:
    """Seconds of a pass for each client."""
    train, module = experiment.dataset.train, experiment.loss_fn.module.eval()
    began = time.perf_counter()
    with torch.inference_mode():
        for part in experiment.held:
            inputs, targets = train.batch(torch.from_numpy(part))
            outputs = torch.func.functional_call(module, params, (inputs,))
            int((outputs.argmax(1) == targets).sum())
            float(functional.cross_entropy(outputs, targets, reduction="sum"))
    return time.perf_counter() - began


def main() -> None:
    """Print both times and their ratio, by source of noise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--model", default="mlp")
    args = parser.parse_args()
    dataset = made_up(args.clients, args.rows)
    for source in ("seeded", "system"):
        config = RunConfig(
            num_clients=args.clients,
            model=args.model,
            evaluate="clients",
            holdout_share=0.5,
            evaluation_budget=4.0,
            target_epsilon=8.0,
            noise_source=source,
        )
        experiment = Experiment.build(config, dataset=dataset)
        params, own, loop = experiment.shared(1), list[float](), list[float]()
        with tempfile.TemporaryDirectory() as folder, PrivacyLedger(Path(folder) / "ledger.sqlite") as ledger:
            roster = Roster(
                make_plans(config),
                ledger,
                delta=config.delta,
                accountant=config.accountant,
                cohort_size=args.clients,
                max_rounds_per_client=config.num_rounds,
                seed=0,
            )
            evaluate = PrivateEvaluation(experiment, roster)
            for round in range(1, 6):
                loop.append(bare(experiment, params))
                began = time.perf_counter()
                evaluate(round, params, redone=False)
                own.append(time.perf_counter() - began)
        ratio = min(own) / min(loop)
        print(
            f"{args.clients} clients, noise {source:7} {min(own):.2f} s, bare loop {min(loop):.2f} s, ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
