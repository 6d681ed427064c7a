#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 numpy==2.4.6
# What: In ghost clipping a penalty on the weights, `criterion(model(x), y) + lam * sum(p ** 2)`, is added to each
#   example's loss after the norms are taken, so it is not clipped.
# A good guess: The wrapped loss takes `+` with a tensor; so the penalty is either clipped with each example or
#   refused. One example contributes at most max_grad_norm = 1.
# Seen: one example, lam = 100: contribution of norm 231 (lam = 0: 0.81). Mode hooks drops the penalty's gradient:
#   0.81 for every lam.
# Why it matters: A penalty in the loss is the textbook form of weight decay and of FedProx. Noise is drawn for a
#   contribution of 1, and the number of examples of the batch leaks, times the penalty's gradient.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def contribution(mode, lam):
    torch.manual_seed(3)
    model, x, y = nn.Linear(3, 2), torch.randn(1, 3), torch.tensor([0])
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 1.0),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    private, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    loss = criterion(private(x), y) + lam * sum((p**2).sum() for p in model.parameters())
    loss.backward()
    optimizer.step()
    return float(torch.cat([p.summed_grad.flatten() for p in model.parameters()]).norm())


got = {(mode, lam): contribution(mode, lam) for mode in ("hooks", "ghost") for lam in (0.0, 100.0)}
print(got)
assert got["ghost", 0.0] < 1.001 and got["hooks", 0.0] < 1.001
assert got["ghost", 100.0] > 50
assert got["hooks", 100.0] == got["hooks", 0.0]
PY
