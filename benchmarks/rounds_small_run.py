"""A whole run of fed_dpsat on small clients, by this build or an earlier one: this file run by its path.

``PYTHONPATH=CHECKOUT python .../rounds_small_run.py JSON`` takes turns (``benchmarks.turns``), with the packages of
``CHECKOUT``. So it uses public names alone, which earlier builds have too.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.turns import Turn, turn_from_stdin
from fed_dpsat import RunConfig, simulate


def small_config(*, clients: int, rounds: int, model: str, local_steps: int, stack: int) -> RunConfig:
    """DP-SAT with seeded noise on 64 random 1x8x8 images a client: steps of (expected) batch 16, ``stack`` together."""
    return RunConfig(
        dataset="benchmarks.rounds_plugins:small_images",
        model=model,
        num_clients=clients,
        lr=0.1,
        local_steps=local_steps,
        sample_rate=0.25,
        num_rounds=rounds,
        evaluate_every=rounds,
        noise_multiplier=1.0,
        physical_batch_size=max(128, 32 * stack),
        stack_clients=stack,
    )


def run(config: RunConfig, turn: Turn) -> dict[str, Tensor]:
    """The model after the last round, with private strategy, ledger on disk and run folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        simulate(config, out, on_round=lambda _: turn())
        params: dict[str, Tensor] = torch.load(out / "checkpoint" / "model.pt", weights_only=True)["params"]
        return params


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(small_config(**json.loads(sys.argv[1])), turn_from_stdin())
