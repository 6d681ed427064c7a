#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 numpy==2.4.6
# What: `DPMultiheadAttention(batch_first=True)` with more than one head mixes heads and positions: it views heads
#   and time as time and heads without moving the axes back.
# A good guess: With the weights of `nn.MultiheadAttention` it gives that module's output, as it does for
#   batch_first=False.
# Seen: batch_first=False: difference below 1e-6. batch_first=True: below 1e-6 with one head, with two heads the
#   largest difference is larger than the largest output (ratio 1.28).
# Why it matters: `ModuleValidator.fix` puts this module in the place of nn.MultiheadAttention: a pre-trained
#   transformer computes something else before the first private step, without an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus.layers import DPMultiheadAttention
from torch import nn

ratio = {}
for heads in (1, 2):
    for batch_first in (False, True):
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(8, heads, batch_first=batch_first)
        private = DPMultiheadAttention(8, heads, batch_first=batch_first)
        private.load_state_dict(theirs.state_dict())
        x = torch.randn(3, 5, 8)
        with torch.no_grad():
            right, got = theirs(x, x, x)[0], private(x, x, x)[0]
        ratio[heads, batch_first] = float((got - right).abs().max() / right.abs().max())
print(ratio)
assert ratio[1, False] < 1e-5 and ratio[1, True] < 1e-5 and ratio[2, False] < 1e-5
assert ratio[2, True] > 0.3
PY
