"""pfl-research on small clients, as a contestant that takes turns; other work than ours: noise on a whole update.

``python -m benchmarks.pfl_small DATA.npz COHORT ROUNDS MODEL LOCAL_STEPS``, run by a Python that has ``pfl[pytorch]``;
nothing of fed_dpsat is imported. ``DATA.npz`` holds ``inputs[N, 1, 8, 8]`` and ``labels[N]``. A user has 64 examples
and takes ``LOCAL_STEPS`` steps of SGD with 16 of them; the Gaussian mechanism clips its update to 0.5, with noise 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.pfl_baseline import Measured, train
from benchmarks.turns import turn_from_stdin


def layers(model: str) -> list[nn.Module]:
    """Those of the models of the same names in ``fed_dpsat.models``, for 1x8x8 and 10 classes."""
    if model == "linear":
        return [nn.Flatten(), nn.Linear(64, 10)]
    if model == "mlp-small":
        return [nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)]
    found: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        found += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after, affine=False), nn.Tanh()]
        found.append(nn.AvgPool2d(2))
    return [*found, nn.Flatten(), nn.Linear(64, 10)]


if __name__ == "__main__":
    data, cohort, rounds, model, steps = sys.argv[1:]
    torch.manual_seed(0)
    np.random.seed(0)  # pfl draws users from the global generator
    torch.set_num_threads(1)
    train(
        Path(data),
        int(cohort),
        int(rounds),
        "local",
        turn_from_stdin(),
        module=Measured(*layers(model)),
        examples_per_user=64,
        batch_size=16,
        local_steps=int(steps),
        clipping_bound=0.5,
    )
