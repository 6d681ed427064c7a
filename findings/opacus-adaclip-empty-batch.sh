#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 numpy==2.4.6
# What: The optimizer of adaptive clipping raises on an empty batch; that of flat clipping takes it.
# A good guess: An empty Poisson batch is a step like any other: noise, a count of zero, a charge. The plain
#   DPOptimizer says `Empty batch` in its code and steps.
# Seen: DPOptimizer: a step. AdaClipDPOptimizer: RuntimeError, cannot reshape tensor of 0 elements.
# Why it matters: Small clients of a federation draw empty batches often (100 examples, rate 0.01: 37 % of steps).
#   Catching the error and skipping the step changes the mechanism: the charge supposes that noise was added.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus import GradSampleModule
from opacus.optimizers import AdaClipDPOptimizer
from torch import nn


def private_linear(expected_batch_size):
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = AdaClipDPOptimizer(
        torch.optim.SGD(model.parameters(), 1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=expected_batch_size,
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=10.0,
        min_clipbound=0.01,
        unclipped_num_std=1e-6,
    )
    return GradSampleModule(model), optimizer


from opacus.optimizers import DPOptimizer

model, adaptive = private_linear(4)
flat = DPOptimizer(
    torch.optim.SGD(model.parameters(), 1.0), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
)


def step(optimizer):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.long)).backward()
    optimizer.step()


step(flat)
assert all(p.grad.abs().sum() > 0 for p in model.parameters())  # noise alone
try:
    step(adaptive)
except RuntimeError as error:
    print("RuntimeError:", error)
    assert "0 elements" in str(error)
else:
    raise SystemExit("an empty batch is a step now")
PY
