"""Runs over seeds in one process, with stored results; the statistics are those of a sweep."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fed_dpsat import RunConfig, simulate
from fed_dpsat.lab.sweep.statistics import difference, half_width, spread

__all__ = ["accuracies", "difference", "half_width", "kept", "spread"]


def accuracies(config: RunConfig, seeds: Iterable[int], **changes: Any) -> list[float]:
    """Test accuracy in percent after the last round, one per seed; on one thread, evaluated once."""
    torch.set_num_threads(1)
    found = []
    for seed in seeds:
        gc.freeze()  # stock Bulyan collects garbage once per array of each reply
        settings = dataclasses.replace(config, **{**changes, "seed": seed, "evaluate_every": config.num_rounds})
        with tempfile.TemporaryDirectory() as folder:
            found.append(100 * simulate(settings, f"{folder}/run")["test_accuracy"])
    return found


def kept(path: Path | None, key: str, measure: Callable[[], list[float]]) -> list[float]:
    """The result of ``measure``; with a ``path`` it is stored, so that interrupted work continues."""
    known: dict[str, list[float]] = json.loads(path.read_text()) if path and path.exists() else {}
    if key not in known:
        known[key] = measure()
        if path:
            path.write_text(json.dumps(known, indent=0))
    return known[key]
