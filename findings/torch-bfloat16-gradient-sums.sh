#!/usr/bin/env bash
# Packages: torch==2.13.0 numpy==2.4.6
# What: On a CPU the backward pass of Embedding, Conv2d and LayerNorm adds up a bfloat16 gradient in bfloat16 and
#   stops at 256 or 1024; sum, Linear, BatchNorm and GroupNorm add up in float32.
# A good guess: All reductions of bfloat16 are kept in float32 until they are stored, as Tensor.sum does: 5,000 ones
#   give 4992, the nearest bfloat16.
# Seen: 5,000 (conv: 20,000) contributions of 1: Embedding 256, LayerNorm's bias 256 (512 with two threads),
#   Conv2d's weight 1024; Linear 4992, GroupNorm 19968 of 20,000.
# Why it matters: A token that is frequent in a batch, or a large physical batch, gets a gradient up to 20 times too
#   small, and other layers of the same model do not. Sum clipped gradients in float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch import nn

torch.set_num_threads(1)
kind, count = torch.bfloat16, 5000
embedding = nn.Embedding(3, 2).to(kind)
embedding(torch.zeros(count, dtype=torch.long)).sum().backward()
conv = nn.Conv2d(1, 1, 1).to(kind)
conv(torch.ones(count, 1, 2, 2, dtype=kind)).sum().backward()
layer = nn.LayerNorm(4).to(kind)
layer(torch.randn(count, 4).to(kind)).sum().backward()
linear = nn.Linear(3, 2).to(kind)
linear(torch.ones(count, 3, dtype=kind)).sum().backward()
group = nn.GroupNorm(1, 1).to(kind)
group(torch.randn(count, 1, 4).to(kind)).sum().backward()
got = {
    "sum": torch.ones(count, dtype=kind).sum().item(),
    "linear": linear.bias.grad[0].item(),
    "groupnorm": group.bias.grad[0].item(),
    "embedding": embedding.weight.grad[0, 0].item(),
    "layernorm": layer.bias.grad[0].item(),
    "conv": conv.weight.grad.item(),
}
print(got)
assert got["sum"] == got["linear"] == 4992 and got["groupnorm"] == 19968
assert got["embedding"] == got["layernorm"] == 256 and got["conv"] == 1024
PY
