"""The runs of docs/gallery.md, condensed into docs/runs: python -m simulations.gallery.

The claim is the content of the gallery: digits, ten clients, 30 rounds, linear model, seeds 0 to 2 (n = 3), delta 1e-4.
``budgets``: DP-SAT and DP-SGD at epsilon 0.5, 1, 3 and 8, and without noise. No setting was tuned. It takes minutes,
keeps complete runs and resumes a killed one. ``python -m tools.gallery`` makes the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fed_dpsat import RunConfig, simulate
from fed_dpsat.lab.report.condensed import write_runs
from fed_dpsat.run.reading import load_run

ROOT = Path(__file__).parents[1]
BASE = ROOT / "simulations" / "digits_dpsat.toml"


def budgets() -> Iterator[tuple[str, dict[str, Any]]]:
    """Two methods at four budgets, and runs without noise."""
    for optimizer in ("dp-sat", "dp-sgd"):
        for epsilon in (0.5, 1.0, 3.0, 8.0):
            yield f"{optimizer}-{epsilon:g}", {"optimizer": optimizer, "target_epsilon": epsilon}
    yield "open", {"optimizer": "dp-sgd", "private": False, "target_epsilon": 0.0}


SETS = {"budgets": budgets}


def make(variants: Iterable[tuple[str, dict[str, Any]]], seeds: Iterable[int], folder: Path) -> list[Path]:
    """The run folders; runs the missing ones."""
    base, found = RunConfig.load(BASE), []
    variants = list(variants)
    for seed in seeds:
        for name, changes in variants:
            out = folder / f"{name}-{seed}"
            if not (out / "summary.json").exists():
                begun = (out / "config.toml").exists()
                simulate(dataclasses.replace(base, **changes, seed=seed, resume=begun), out)
            found.append(out)
    return found


def main() -> None:
    """Run all and condense."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=Path("runs/gallery"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "runs", help="folder of the JSON lines")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for name, variants in SETS.items():
        folders = make(variants(), range(chosen.seeds), chosen.keep)
        write_runs([load_run(folder) for folder in folders], chosen.out / f"{name}.jsonl")
        print(chosen.out / f"{name}.jsonl", flush=True)


if __name__ == "__main__":
    main()
