"""The sharpness of the last model of a run on its public test split: ``sharpness.json`` in its folder, and as text."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.lab.sharpness import ASCENT_STEPS, draw_landscape, mean_loss, measure
from fed_dpsat.lab.sharpness import landscape as landscape_of
from fed_dpsat.run.finished import read_run


def measure_run(
    run: Path,
    *,
    examples: int = 0,
    rho: float = 0.05,
    m: int = 128,
    top: int = 1,
    probes: int = 32,
    landscape: Path | None = None,
    points: int = 21,
) -> dict[str, Any]:
    """Measure, and write ``sharpness.json``; ``examples`` is the number of test examples from the first, 0 for all.

    Raises ``SettingError`` for a folder without a run and for a run with objects from Python, ``RunError`` without a
    checkpoint.
    """
    experiment, checkpoint = read_run(run, again="measure with the version that has it")
    test = experiment.dataset.test
    test.of_classes("sharpness")
    if not 0 <= examples <= len(test):
        raise SettingError("examples", examples, f"in [0, {len(test)}]", "0 uses the whole test split")
    if examples:
        test = test.rows(torch.arange(examples))
    module = experiment.loss_fn.module
    found = measure(
        module,
        checkpoint.params,
        test,
        rho=rho,
        m=min(m, len(test)),
        top=top,
        probes=probes,
        seed=experiment.config.seed,
    )
    record = {"split": "test", "round": checkpoint.round, **dataclasses.asdict(found)}
    record |= {name: list(value) for name, value in record.items() if isinstance(value, tuple)}
    if landscape:
        config = experiment.config
        params = {name: p.double() for name, p in checkpoint.params.items()}
        with torch.no_grad():
            steps, losses = landscape_of(mean_loss(module, test), params, points=points, seed=config.seed)
        title = f"{config.optimizer}, {config.model}, {len(test)} test examples of {config.dataset}, seed {config.seed}"
        draw_landscape(steps, losses, title, landscape)
    (run / "sharpness.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def sharpness_words(found: dict[str, Any]) -> str:
    """A paragraph on ``found``."""
    eigenvalues = ", ".join(f"{value:.4g}" for value in found["top_eigenvalues"])
    digits = max(0, 1 - math.floor(math.log10(found["trace_error"]))) if found["trace_error"] > 0 else 4
    return (
        f"On {found['examples']} examples of the public test split, after round {found['round']}: loss "
        f"{found['loss']:.4f} nats, gradient norm {found['gradient_norm']:.4f}. Hessian: largest eigenvalue(s) "
        f"{eigenvalues}; trace {found['trace']:.{digits}f} (standard error {found['trace_error']:.{digits}f}). "
        f"m-sharpness, m = {found['m']}, rho = {found['rho']:g}: the loss rises by {found['one_step']:.5f} after SAM's "
        f"one step and by {found['projected']:.5f} after {ASCENT_STEPS} steps of projected ascent. Compare models of "
        "one architecture only."
    )
