#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 numpy==2.4.6
# What: An epoch of 93 batches has 92 under Poisson sampling: the sampler's length is int(1 / (1 / 93)), and 1 / (1
#   / 93) is 92.99999999999999.
# A good guess: `make_private` keeps the number of batches of the loader that it is given.
# Seen: of the lengths 1 to 399, 19 lose a batch: 93, 99, 105, 117, 123, 186, 198, 210, 211, 221, ...
# Why it matters: Steps planned by batches and steps taken differ, so noise calibrated for 93 steps an epoch is a
#   little too much, and a run that counts steps by len(loader) before and after make_private disagrees with itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus.data_loader import DPDataLoader
from torch.utils.data import DataLoader, TensorDataset

short = []
for batches in range(1, 400):
    plain = DataLoader(TensorDataset(torch.zeros(batches, 1)), batch_size=1)
    if len(DPDataLoader.from_data_loader(plain)) != len(plain):
        short.append(batches)
print(short)
assert len(short) == 19 and short[:5] == [93, 99, 105, 117, 123]
PY
