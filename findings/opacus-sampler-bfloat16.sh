#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 numpy==2.4.6
# What: `UniformWithReplacementSampler` draws its coins in torch's default type. With
#   torch.set_default_dtype(torch.bfloat16), the way to build a model in half precision, the numbers are multiples
#   of 1/256 or so and the rate is another one.
# A good guess: Coins for examples do not depend on the type of the model: the sampler's mean rate is sample_rate.
# Seen: sample_rate 0.001 over 12,000,000 coins: float32 0.0010, bfloat16 0.0029.
# Why it matters: A step takes three times the examples that the accountant charges for, so the printed epsilon is
#   too small. Draw coins in float32 or float64 whatever the default type is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

rate = {}
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    sampler = UniformWithReplacementSampler(num_samples=60_000, sample_rate=0.001, steps=200)
    rate[dtype] = sum(len(batch) for batch in sampler) / 200 / 60_000
print(rate)
assert abs(rate[torch.float32] - 0.001) < 1e-4
assert rate[torch.bfloat16] > 0.002
PY
