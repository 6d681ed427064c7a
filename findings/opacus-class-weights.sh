#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 numpy==2.4.6
# What: With `CrossEntropyLoss(weight=...)` (reduction mean) one example changes the clipped sum by far more than
#   max_grad_norm: torch divides by the sum of the batch's weights, and Opacus takes it for a division by the number
#   of examples.
# A good guess: Adding one example moves the sum of clipped gradients by at most max_grad_norm = 1, whatever the
#   loss.
# Seen: 100 examples of a class of weight 0.01 and one more of a class of weight 1: the sum moves by 29.6. Without
#   weights by 1.0.
# Why it matters: Class weights are the usual cure for rare classes. The noise is for a sensitivity of 1: the
#   printed epsilon does not hold, and nothing says so. A loss per example has to be a function of that example
#   alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn


def clipped_sum(x, y, weight):
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    private = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), 1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1
    )
    nn.CrossEntropyLoss(weight=weight)(private(x), y).backward()
    optimizer.step()
    return torch.cat([p.summed_grad.flatten() for p in model.parameters()])


x, y = torch.ones(101, 3), torch.zeros(101, dtype=torch.long)
y[-1] = 1
moved = {}
for rare in (0.01, 1.0):
    weight = torch.tensor([rare, 1.0])
    moved[rare] = float((clipped_sum(x, y, weight) - clipped_sum(x[:-1], y[:-1], weight)).norm())
print(moved)
assert moved[1.0] < 1.001
assert moved[0.01] > 20
PY
