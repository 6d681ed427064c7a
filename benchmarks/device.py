"""Seconds of a private DP-SAT step and peak memory per model, on one CPU thread of a device.

    python -m benchmarks.device

One process per model, so that the memory is that model's: imports, weights, optimizer and physical batch. A step is
of 64 examples with noise from the operating system; the first one, which plans, is not timed.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import torch

from fed_dpsat import plugins
from fed_dpsat.params import trainable
from fed_dpsat.run.process import tune_allocator
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.secure_noise import system_generator
from fed_dpsat.testing.problems import step_info

SHAPES = {
    "linear": (1, 28, 28),
    "mlp": (1, 28, 28),
    "tanh-cnn-small": (3, 32, 32),
    "tanh-cnn": (3, 32, 32),
    "resnet20-gn": (3, 32, 32),
    "wrn16-4-gn": (3, 32, 32),
    "resnet10-gn": (1, 28, 28),
    "dpnasnet-cifar": (3, 32, 32),
}
BATCH, STEPS = 64, 5


def measure(name: str) -> dict[str, object]:
    """Parameters, MB of an update, seconds of a step and peak MB of this process."""
    torch.set_num_threads(1)
    tune_allocator()
    shape = SHAPES[name]
    module = plugins.build("model", name, {"input_shape": shape, "num_classes": 10})
    loss_fn, params, optimizer = ModelLoss(module), trainable(module), DPSAT(base=DPSGD(lr=0.1), rho=0.03)
    batch = torch.randn(BATCH, *shape), torch.randint(10, (BATCH,))
    mechanism = GaussianMechanism(noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=BATCH)
    state, noise, times = optimizer.init(params), system_generator(), []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        at = optimizer.query_point(params, state, step_info())
        clipped_sum, _ = clipped_gradient_sum(loss_fn, at, batch, FlatClipping(clip_norm=1.0))
        params, state = optimizer.update(params, mechanism.privatize(clipped_sum, noise), state, step_info())
        times.append(time.perf_counter() - began)
    count = sum(p.numel() for p in params.values())
    return {
        "model": name,
        "input": "x".join(map(str, shape)),
        "parameters": count,
        "update_mb": round(4 * count / 1e6, 2),
        "seconds_per_step": round(sorted(times[1:])[STEPS // 2], 4),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        for model in SHAPES:
            subprocess.run([sys.executable, "-m", "benchmarks.device", model], check=True)
