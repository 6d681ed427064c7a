#!/usr/bin/env bash
# Packages: torch==2.13.0, torchmetrics==1.9.0
# What: MeanAbsoluteError and Perplexity, whose states are float32, are updated with bfloat16 outputs.
# A good guess: each batch is added up in float32, so that only the outputs are rounded; 1.0 has no rounding at all.
# Seen: errors of exactly 1.0, 3,000 a batch, have the mean 1.0027, because a batch is added up and rounded in bfloat16
#   before it reaches the state. The perplexity of 100 tokens of random logits is 1571.8; that of the same bfloat16
#   logits in float32 is 1550.3, as in float64.
# Why it matters: Models are evaluated under autocast, and methods are compared by fractions of a percent. Widen outputs
#   before update().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torchmetrics.regression import MeanAbsoluteError
from torchmetrics.text import Perplexity

distance = MeanAbsoluteError()
for _ in range(10):
    distance.update(torch.ones(3000, dtype=torch.bfloat16), torch.zeros(3000, dtype=torch.bfloat16))
print("mean of errors of 1.0:", float(distance.compute()), distance.sum_abs_error.dtype)
assert distance.sum_abs_error.dtype == torch.float32
assert float(distance.compute()) > 1.002

generator = torch.Generator().manual_seed(0)
logits = torch.randn(2, 50, 1000, generator=generator).bfloat16()
tokens = torch.randint(0, 1000, (2, 50), generator=generator)
values = {}
for name, given in (("bfloat16", logits), ("float32", logits.float())):
    perplexity = Perplexity()
    perplexity.update(given, tokens)
    values[name] = float(perplexity.compute())
exact = float(torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), tokens.flatten()).exp())
print("perplexity", values, "exact", exact)
assert abs(values["float32"] / exact - 1) < 1e-4
assert abs(values["bfloat16"] / exact - 1) > 0.005
PY
