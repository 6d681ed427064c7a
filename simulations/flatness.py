"""Flatness of the minima of DP-SAT and DP-SGD, and calibration at small clip norms, on the digits.

Writes docs/results/sharpness.md: python -m simulations.flatness --keep FILE. Epsilon is 3 at delta 1e-4 in all runs;
the seed is that of data, batches and noise, so differences are paired. n is the number of --seeds.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from fed_dpsat import RunConfig, simulate
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import predict, quality_of
from fed_dpsat.lab.report.sharpness import measure_run
from fed_dpsat.run.folder import RunFolder
from simulations.repeat import half_width, kept

BASE = RunConfig(
    dataset="digits", model="mlp", target_epsilon=3.0, delta=1e-4, num_rounds=30, stack_clients=10, evaluate_every=30
)
METHODS = {
    "DP-SGD": {"optimizer": "dp-sgd"},
    "DP-SAT, rho 0.03": {"optimizer": "dp-sat", "rho": 0.03},
    "DP-SAT, rho 0.1": {"optimizer": "dp-sat", "rho": 0.1},
    "DP-SAT, rho 0.3": {"optimizer": "dp-sat", "rho": 0.3},
}
CLIP_NORMS = (0.05, 0.5, 5.0, 50.0)
PRODUCT = 1.0
"""Learning rate times clip norm in the comparison of clip norms: a clipped example moves the model as far in each."""

MEASURES = (
    "test accuracy (%)",
    "loss (nats)",
    "ECE (%)",
    "top eigenvalue",
    "trace",
    "rise, one step",
    "rise, projected",
)


def main() -> None:
    """Run all and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="JSON file of results; an interrupted run continues from it")
    parser.add_argument("--out", type=Path, default=Path("docs/results/sharpness.md"))
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    flat: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    clip: dict[str, list[list[float]]] = {f"{norm:g}": [] for norm in CLIP_NORMS}
    for seed in range(chosen.seeds):
        for name, changes in METHODS.items():
            measure = partial(_measured, seed=seed, lr=2.0, **changes)
            flat[name].append(kept(chosen.keep, f"{name}, seed {seed}", measure))
        for norm in CLIP_NORMS:
            measure = partial(_measured, seed=seed, optimizer="dp-sgd", clip_norm=norm, lr=PRODUCT / norm)
            clip[f"{norm:g}"].append(kept(chosen.keep, f"clip norm {norm:g}, seed {seed}", measure))
    chosen.out.write_text(_text(flat, clip, chosen.seeds))


def _measured(**changes: object) -> list[float]:
    """``MEASURES`` of one run, on the public test split."""
    config = RunConfig.from_mapping({**BASE.settings(), **changes})
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        simulate(config, run)
        found = measure_run(run, rho=0.05, m=360, probes=16)
        checkpoint = RunFolder(run, resume=True).load_checkpoint()
        assert checkpoint is not None  # the run is over
        experiment = Experiment.build(config)
        predictions = predict(experiment.loss_fn.module, checkpoint.params, experiment.dataset.test)
        seen = quality_of(predictions, experiment.dataset.num_classes)
    return [
        100 * seen.accuracy,
        seen.nll,
        100 * seen.ece,
        found["top_eigenvalues"][0],
        found["trace"],
        found["one_step"],
        found["projected"],
    ]


TEXT = """# Sharpness and calibration on the digits

`python -m simulations.flatness --seeds {n}`; seeds 0 to {last}, n = {n}. Epsilon {epsilon:g} at delta {delta:g} in
every run, {clients} clients, {rounds} rounds, model {model}, measured on all 360 images of the public test split. Mean
with a 95 % interval over seeds (Student's t). Differences are paired by seed, which sets data, batches and noise; in
bold where the interval excludes 0, without a correction for the number of comparisons. Sharpness is that of the mean
cross-entropy in float64: largest eigenvalue of the Hessian, its trace (Hutchinson, 16 probes), and how far the loss of
all 360 images rises within rho = 0.05 after SAM's one step and after 20 steps of projected ascent.

## Does DP-SAT find flatter minima than DP-SGD?

All at learning rate 2 and clip norm 0.5; nothing was tuned.

{flat}
Difference from DP-SGD:

{flat_differences}
## Does a small clip norm cost calibration?

DP-SGD with a learning rate of {product:g} over the clip norm (Bu et al. 2021 compare small with large bounds). ECE has
15 bins of equal width.

{clip}
Difference from clip norm 0.05:

{clip_differences}"""


def _text(flat: dict[str, list[list[float]]], clip: dict[str, list[list[float]]], seeds: int) -> str:
    return TEXT.format(
        n=seeds,
        last=seeds - 1,
        epsilon=BASE.target_epsilon,
        delta=BASE.delta,
        clients=BASE.num_clients,
        rounds=BASE.num_rounds,
        model=BASE.model,
        product=PRODUCT,
        flat=_table("method", flat),
        flat_differences=_differences(flat, "DP-SGD"),
        clip=_table("clip norm", clip),
        clip_differences=_differences(clip, "0.05"),
    )


def _table(label: str, rows: dict[str, list[list[float]]]) -> str:
    lines = [f"| {label} | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 1) + "|"]
    for name, runs in rows.items():
        cells = [_shown(sum(values) / len(values), half_width(values)) for values in zip(*runs, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _differences(rows: dict[str, list[list[float]]], against: str) -> str:
    lines = [f"| minus {against} | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 1) + "|"]
    reference = list(zip(*rows[against], strict=True))
    for name, runs in rows.items():
        if name != against:
            cells = [_difference(a, b) for a, b in zip(zip(*runs, strict=True), reference, strict=True)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _difference(values: Sequence[float], reference: Sequence[float]) -> str:
    apart = [a - b for a, b in zip(values, reference, strict=True)]
    mean, half = sum(apart) / len(apart), half_width(apart)
    shown = _shown(mean, half)
    return f"**{shown}**" if half is not None and abs(mean) > half else shown


def _shown(mean: float, half: float | None) -> str:
    """The estimate, rounded to two digits of its interval."""
    if not half:
        return f"{mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


if __name__ == "__main__":
    main()
