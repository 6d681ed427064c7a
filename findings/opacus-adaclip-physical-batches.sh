#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 numpy==2.4.6
# What: Under `BatchMemoryManager`, adaptive clipping sees the last physical batch of a step only: zero_grad clears
#   its count after each part.
# A good guess: Physical batches change nothing: the bound after one step of 64 examples is the same for parts of 64
#   and of 16.
# Seen: 64 examples, 6 of them unclipped, none in the last 16: parts of 64 give 1.088, parts of 16 give 1.105 (as if
#   all were clipped).
# Why it matters: A limit of memory decides the clip norm, and the noise on the count is for 64 examples where 16
#   are counted.
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


from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(1)
x = torch.randn(64, 3) * torch.linspace(0.1, 10, 64)[:, None]
data = TensorDataset(x, torch.zeros(64, dtype=torch.long))
bound = {}
for physical in (64, 16):
    model, optimizer = private_linear(64)
    loader = DataLoader(data, batch_size=64)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as parts:
        for features, labels in parts:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(features), labels).backward()
            optimizer.step()
    bound[physical] = float(optimizer.max_grad_norm)
print(bound)
assert abs(bound[64] - 1.0880) < 1e-3
assert abs(bound[16] - 1.1052) < 1e-3
PY
