#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 numpy==2.4.6
# What: Leaving the loop of a `BatchMemoryManager` in the middle of a step leaves the half-summed gradients and one
#   flag too many in the optimizer: the next epoch's first step holds the old part, its own batch and a part of the
#   next one.
# A good guess: `break` (a limit of steps, early stopping) drops what was not stepped. Each step sums one batch of 8
#   examples.
# Seen: 8 examples a batch in parts of at most 3, break in the second batch after one part: the first step of the
#   next epoch sums 14 examples.
# Why it matters: An example that is in more than one of these batches counts each time in one noisy step: its
#   sensitivity is 2 or 3 times max_grad_norm, the charge is for one. optimizer.zero_grad() is no cure: it keeps the
#   sum on purpose.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Linear(1, 1, bias=False)
private = GradSampleModule(model, loss_reduction="sum")
optimizer = DPOptimizer(
    torch.optim.SGD(model.parameters(), 0.0),
    noise_multiplier=0.0,
    max_grad_norm=1.0,
    expected_batch_size=1,
    loss_reduction="sum",
)
loader = DataLoader(TensorDataset(torch.ones(32, 1)), batch_size=8)
summed = []  # each example's gradient is 1, so the sum is the number of examples
optimizer.attach_step_hook(lambda stepped: summed.append(round(float(model.weight.summed_grad))))
for epoch in range(2):
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
        for number, (x,) in enumerate(parts):
            if epoch == 0 and number == 4:
                break
            optimizer.zero_grad()
            private(x).sum().backward()
            optimizer.step()
print(summed)
assert summed[0] == 8
assert summed[1] > 8
PY
