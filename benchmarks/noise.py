"""The time of noise and of a step: 0.55M parameters, one thread, ``python -m benchmarks.noise [--json]``.

Each number is a median over rounds in which all contestants take turns, so a busy machine slows all equally.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from fed_dpsat.models.cnn import tanh_cnn
from fed_dpsat.params import Params, trainable
from fed_dpsat.run.process import tune_allocator
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import derive_generator
from fed_dpsat.step.secure_noise import add_noise_on_grid, system_generator

BATCH, ROUNDS, STEPS_EVERY = 64, 45, 3
STEP = "step: vmap, batch 64"


def contestants() -> dict[str, Callable[[], object]]:
    """The timed functions by name; the step comes first."""
    module = tanh_cnn((3, 32, 32), 10)
    params, loss_fn, rule = trainable(module), ModelLoss(module), FlatClipping(clip_norm=1.0)
    batch = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    mechanism = GaussianMechanism(noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=BATCH)
    seeded, system = derive_generator(0, purpose="noise"), system_generator()
    return {
        STEP: lambda: clipped_gradient_sum(loss_fn, params, batch, rule, engine="vmap"),
        "seeded, as added in a run": lambda: mechanism.privatize(params, seeded),
        "system, float32 normals without protection": lambda: _unprotected(params, system),
        "system on the grid, as added in a run": lambda: mechanism.privatize(params, system),
        "system on the grid, sum of 4 normals (not used)": lambda: _sum_of_four(params, system),
        "a generator of its own, once per round": system_generator,
    }


def _unprotected(params: Params, generator: np.random.Generator) -> Params:
    noise = {n: torch.from_numpy(generator.standard_normal(p.shape, dtype=np.float32)) for n, p in params.items()}
    return {n: torch.add(p, noise[n], alpha=1.0) / BATCH for n, p in params.items()}


class _SumOfFour:
    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator

    def standard_normal(self, size: int) -> np.ndarray:
        total = self.generator.standard_normal(size)
        for _ in range(3):
            total += self.generator.standard_normal(size)
        return total / 2


def _sum_of_four(params: Params, generator: np.random.Generator) -> Params:
    noisy = add_noise_on_grid(params, noise_multiplier=1.0, clip_norm=1.0, generator=_SumOfFour(generator))
    return {n: p / BATCH for n, p in noisy.items()}


def measure() -> dict[str, float]:
    """Median milliseconds by name."""
    runs = contestants()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round in range(-1, ROUNDS):
        for name, run in runs.items():
            if name == STEP and round % STEPS_EVERY:
                continue
            start = time.perf_counter()
            run()
            if round >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    tune_allocator()
    medians = measure()
    if as_json:
        print(json.dumps({n: {"ms": ms, "of_a_step": ms / medians[STEP]} for n, ms in medians.items()}, indent=2))
        return
    print("| what | median ms | of a step |\n|---|---|---|")
    for name, ms in medians.items():
        print(f"| {name} | {ms:.2f} | {ms / medians[STEP]:.1%} |")


if __name__ == "__main__":
    main()
