"""Runs over seeds, and what may be said of them: means, standard deviations and 95 % intervals."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t

from fed_dpsat import RunConfig, simulate


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
    """What ``measure`` gives; with a ``path``, once and for all, so that work which was cut off goes on there."""
    known: dict[str, list[float]] = json.loads(path.read_text()) if path and path.exists() else {}
    if key not in known:
        known[key] = measure()
        if path:
            path.write_text(json.dumps(known, indent=0))
    return known[key]


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t."""
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float]) -> str:
    """``mean (sd)`` with one digit."""
    return f"{statistics.mean(values):.1f} ({statistics.stdev(values):.1f})"


def difference(values: Sequence[float], reference: Sequence[float]) -> str:
    """Mean of paired differences with its 95 % interval; bold where that leaves 0 out."""
    pairs = [a - b for a, b in zip(values, reference, strict=True)]
    mean, half = statistics.mean(pairs), half_width(pairs)
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text
