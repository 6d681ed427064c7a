"""Accuracy under each attack for each robust strategy, with and without privacy noise, on the digits.

Writes docs/results/attacks.md: python -m simulations.attack_table. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from pathlib import Path

from fed_dpsat import RunConfig
from fed_dpsat.plugins import builtin
from simulations.repeat import accuracies, kept, spread

HERE = Path(__file__).parent
STOCK = "flwr.serverapp.strategy:"
STRATEGIES = {
    "fedavg": ("fedavg", ""),
    "trimmed": ("trimmed", ""),
    "geometric-median": ("geometric-median", ""),
    "norm-bound": ("norm-bound", ""),
    "FedMedian": (f"{STOCK}FedMedian", ""),
    "FedTrimmedAvg": (f"{STOCK}FedTrimmedAvg", "beta = 0.2"),
    "MultiKrum": (f"{STOCK}MultiKrum", "num_malicious_nodes = 3, num_nodes_to_select = 12"),
    "Krum": (f"{STOCK}Krum", "num_malicious_nodes = 3"),
    "Bulyan": (f"{STOCK}Bulyan", "num_malicious_nodes = 3"),
}
"""The stock ones are told the number of attackers, which in the field nobody knows; the built-in ones are not."""

Found = dict[str, dict[str, list[float]]]
"""Strategy, attack, accuracies."""


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results" / "attacks.md")
    parser.add_argument(
        "--keep", type=Path, help="JSON file of what was measured; a run that was cut off goes on there"
    )
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    private = RunConfig.load(HERE / "attacks.toml")
    started = time.perf_counter()
    with_noise, without = (
        measure(config, range(chosen.seeds), chosen.keep)
        for config in (private, dataclasses.replace(private, private=False, target_epsilon=0.0))
    )
    chosen.out.write_text(_text(private, with_noise, without, chosen.seeds))
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")


def measure(config: RunConfig, seeds: range, keep: Path | None) -> Found:
    """Each strategy under each attack, and under none."""

    def cell(label: str, attack: str) -> list[float]:
        strategy, args = STRATEGIES[label]
        share = config.attackers if attack else 0.0
        changes = {"strategy": strategy, "strategy_args": args, "attack": attack, "attackers": share}
        key = f"{label}, {attack or 'none'}, private={config.private}, {len(seeds)} seeds"
        return kept(keep, key, lambda: accuracies(config, seeds, **changes))

    return {
        label: {attack or "none": cell(label, attack) for attack in ("", *builtin("attack"))} for label in STRATEGIES
    }


def _text(config: RunConfig, with_noise: Found, without: Found, n: int) -> str:
    number = round(config.attackers * config.num_clients)
    return "\n".join(
        [
            "# Attacks on the digits",
            "",
            f"`python -m simulations.attack_table --seeds {n}`; settings of `simulations/attacks.toml`: {number} of "
            f"{config.num_clients} clients attack, {config.num_rounds} rounds, linear model, DP-SAT. Test accuracy in "
            f"percent, mean (sd) of seeds 0 to {n - 1}, n = {n}; chance is 10. Who attacks, data, batches and noise "
            "follow the seed. Attacks have their default strength. The stock strategies were told that "
            f"{number} clients attack; the built-in ones run with their defaults.",
            "",
            f"## With privacy noise: epsilon {config.target_epsilon:g}, delta {config.delta:g}",
            "",
            *_table(with_noise),
            "",
            "## Without privacy noise",
            "",
            *_table(without),
            "",
        ]
    )


def _table(found: Found) -> list[str]:
    attacks = list(next(iter(found.values())))
    return [
        "| strategy | " + " | ".join(attacks) + " |",
        "|---" * (len(attacks) + 1) + "|",
        *(f"| {name} | " + " | ".join(spread(values) for values in of.values()) + " |" for name, of in found.items()),
    ]


if __name__ == "__main__":
    main()
