"""Built-in strategies against FedAvg on the digits, seed by seed: python -m simulations.compare_strategies.

Writes docs/results/strategies.md. Equal seeds share data, batches and noise, so differences are paired. Nothing was
tuned for a strategy: all run with the settings of their scenario and their defaults. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

from fed_dpsat import RunConfig
from fed_dpsat.plugins import builtin
from simulations.repeat import accuracies, difference, kept, spread

HERE = Path(__file__).parent
SCENARIOS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "alike": ("digits_dpsat.toml", "ten clients alike, epsilon 3", {}),
    "noisy": ("digits_dpsat.toml", "ten clients alike, epsilon 1", {"target_epsilon": 1.0}),
    "sizes": (
        "digits_dpsat.toml",
        "sizes of a geometric kind, epsilon 1",
        {"target_epsilon": 1.0, "partition": "size-skew"},
    ),
    "budgets": ("budgets.toml", "five clients with epsilon 0.3, five with 4", {}),
    "skewed": (
        "budgets.toml",
        "the same budgets, labels by Dirichlet(0.3)",
        {"partition": "dirichlet"},
    ),
    "shards": (
        "digits_dpsat.toml",
        "two classes a client, five local steps, lr 0.5, epsilon 3",
        {"partition": "shards", "local_steps": 5, "lr": 0.5},
    ),
}
ASCENT = ("client", "server", "zero")


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results" / "strategies.md")
    parser.add_argument(
        "--keep", type=Path, help="JSON file of what was measured; a run that was cut off goes on there"
    )
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    seeds, started = range(chosen.seeds), time.perf_counter()

    def measure(file: str, key: str, changes: dict[str, Any]) -> list[float]:
        return kept(
            chosen.keep, f"{key}, {len(seeds)} seeds", lambda: accuracies(RunConfig.load(HERE / file), seeds, **changes)
        )

    names = ["fedavg", *(name for name in builtin("strategy") if name != "fedavg")]
    found = {
        scenario: {name: measure(file, f"{scenario}, {name}", {**changes, "strategy": name}) for name in names}
        for scenario, (file, _, changes) in SCENARIOS.items()
    }
    file, _, changes = SCENARIOS["shards"]
    ascents = {
        memory: measure(file, f"ascent {memory}", {**changes, "ascent_memory": memory, "rho": 0.3}) for memory in ASCENT
    }
    chosen.out.write_text(_table(found, ascents, len(seeds)))
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")


def _table(found: dict[str, dict[str, list[float]]], ascents: dict[str, list[float]], n: int) -> str:
    lines = [
        "# Strategies on the digits",
        "",
        f"`python -m simulations.compare_strategies --seeds {n}`. Test accuracy in percent after 30 "
        f"rounds, mean (sd) of seeds 0 to {n - 1}, n = {n}, and below it the mean difference to FedAvg "
        "on the same seeds with its 95 % interval (Student's t); bold where that leaves 0 out. Intervals are not "
        "corrected for the number of comparisons. delta 1e-4, linear model, DP-SAT, one local step unless it says so.",
        "",
        "| scenario | setting |",
        "|---|---|",
        *(
            f"| {name} | {text} (`simulations/{file}`{_said(changes)}) |"
            for name, (file, text, changes) in SCENARIOS.items()
        ),
        "",
        "| strategy | " + " | ".join(found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    for name in next(iter(found.values())):
        cells = [
            spread(of[name]) + ("" if name == "fedavg" else f"<br>{difference(of[name], of['fedavg'])}")
            for of in found.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Where DP-SAT takes its first direction of a round (`ascent_memory`), FedAvg, scenario shards, rho 0.3; the "
        "difference is to `client`:",
        "",
        "| ascent_memory | accuracy | difference |",
        "|---|---|---|",
        *(
            f"| {memory} | {spread(values)} | {'' if memory == 'client' else difference(values, ascents['client'])} |"
            for memory, values in ascents.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _said(changes: dict[str, Any]) -> str:
    return "".join(f", `{key}={value}`" for key, value in changes.items())


if __name__ == "__main__":
    main()
