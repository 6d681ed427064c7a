#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 numpy==2.4.6
# What: The per-example gradient of `nn.EmbeddingBag` counts an index that stands twice in a bag once, and mode
#   `max` has no gradient at all.
# A good guess: The per-example gradient equals autograd on that bag alone, as for every other layer.
# Seen: bag [1, 1, 2] with mode sum: row 1 gets 1 where 2 is right; bag with mode max: 0 where 1 is right.
# Why it matters: Bags of words repeat words. The gradient is too short, so training is silently wrong, and clipping
#   is by a norm that is not the example's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus import GradSampleModule
from torch import nn

index, offset = torch.tensor([1, 1, 2]), torch.tensor([0])
for mode, row, got_value, right_value in (("sum", 1, 1.0, 2.0), ("max", 2, 0.0, None)):
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(4, 1, mode=mode)
    right = torch.autograd.grad(bag(index, offset).sum(), bag.weight)[0]
    GradSampleModule(bag, loss_reduction="sum")(index, offset).sum().backward()
    got = bag.weight.grad_sample[0]
    print(mode, "opacus", got.flatten().tolist(), "autograd", right.flatten().tolist())
    assert got[row].item() == got_value
    assert right.abs().sum() >= 1.0 and not torch.equal(got, right)
    if right_value is not None:
        assert right[row].item() == right_value
assert got.abs().sum() == 0.0  # max
PY
