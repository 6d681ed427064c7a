"""The audits of each method and the epsilon of its ledger: python -m simulations.audit_table prints a table.

Claim: no bound is above the ledger's epsilon. Linear model on the digits, 10 clients, 8 rounds of one step at sample
rate 0.5, noise multiplier 1, delta 1e-4; the game plays the same 8 steps. Seeds are 0; n is the number of repetitions,
or of canaries in one run.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from fed_dpsat import RunConfig
from fed_dpsat.lab.audit import audit_one_run, play
from fed_dpsat.lab.audit.command import game_of
from simulations.repeat import kept

BASE = RunConfig(dataset="digits", num_rounds=8, noise_multiplier=1.0, delta=1e-4, evaluate_every=8)
METHODS: dict[str, dict[str, Any]] = {
    "dp-sgd": {"optimizer": "dp-sgd"},
    "dp-sgd, momentum 0.9": {"optimizer": "dp-sgd", "momentum": 0.9, "lr": 0.5},
    "dp-sat": {"optimizer": "dp-sat"},
    "dp-sat-momentum": {"optimizer": "dp-sat-momentum"},
    "dp-sgd, automatic clipping": {"optimizer": "dp-sgd", "clipping": "automatic"},
    "dp-sgd, global clipping": {"optimizer": "dp-sgd", "clipping": "global"},
    "dp-sgd, per-layer clipping": {"optimizer": "dp-sgd", "clipping": "per-layer"},
    "dp-sgd, adaptive clipping": {"optimizer": "dp-sgd", "clipping": "adaptive"},
    "adam": {"optimizer": "adam", "lr": 0.05},
    "extrapolated": {"optimizer": "extrapolated"},
    "modelmix": {"optimizer": "modelmix"},
    "disk": {"optimizer": "disk"},
    "dplis": {"optimizer": "dplis"},
    "random-freeze": {"optimizer": "random-freeze"},
    "dp-sam": {"optimizer": "dp-sam", "local_steps": 2, "num_rounds": 4},
}
CANARIES = 500


def main() -> None:
    """Audit all and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--keep", type=Path, help="JSON file of results; an interrupted run continues from it")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(f"| method | game, n = {chosen.repetitions} | canaries, m = {CANARIES} | right guesses | ledger |")
    print("|---" * 5 + "|")
    for name, changes in METHODS.items():
        config = RunConfig.from_mapping({**BASE.settings(), **changes})
        game, one_run, correct, guesses, ledger = kept(
            chosen.keep, f"{name}, {chosen.repetitions}", lambda config=config: _found(config, chosen.repetitions)
        )
        print(f"| {name} | {game:.2f} | {one_run:.2f} | {correct:.0f} of {guesses:.0f} | {ledger:.2f} |", flush=True)


def _found(config: RunConfig, repetitions: int) -> list[float]:
    """Both lower bounds, correct guesses and guesses, and the epsilon of the ledger."""
    game = play(game_of(config, repetitions=repetitions, confidence=0.95))
    one_run = audit_one_run(config, canaries=CANARIES)
    assert abs(game.epsilon_ledger - one_run.epsilon_ledger) < 1e-6  # both are charged the same steps
    return [game.epsilon_lower, one_run.epsilon_lower, one_run.correct, one_run.guesses, one_run.epsilon_ledger]


if __name__ == "__main__":
    main()
