#!/usr/bin/env bash
# Packages: torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
# What: `R2Score`, `ExplainedVariance` and `RelativeSquaredError` keep sums of squares of the raw targets in float32
#   and subtract two almost equal numbers at the end. `PearsonCorrCoef` and `ConcordanceCorrCoef` of the same library
#   keep running means.
# A good guess: float32 is enough for a score that is read to three digits: 0.500, as Pearson's r is right to 1e-5 on
#   the same numbers.
# Seen: 51,200 air pressures around 101,325 Pa in batches of 128. Standard deviation 150: R2 is 0.627, that of a
#   float64 loop 0.500. Standard deviation 25: 1.160, beyond 1, where 0.497 is right. Pearson's r is right to 1e-5 in
#   both.
# Why it matters: Pressures, years, kelvins and prices have a large offset. The error depends on the batch size, so
#   the score of one model differs between clients. Subtract a public constant from targets and outputs before
#   update(), or use set_dtype(torch.float64) with float64 inputs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torchmetrics.regression import PearsonCorrCoef, R2Score

generator = torch.Generator().manual_seed(0)
for spread, least in ((150.0, 0.05), (25.0, 0.3)):
    noise = spread * torch.randn(2, 51200, generator=generator)
    targets = 101325 + noise[0]
    outputs = 101325 + 0.5 * noise[0] + 0.5 * noise[1]
    r2, pearson = R2Score(), PearsonCorrCoef()
    for start in range(0, len(targets), 128):
        r2.update(outputs[start : start + 128], targets[start : start + 128])
        pearson.update(outputs[start : start + 128], targets[start : start + 128])
    y, p = targets.double(), outputs.double()
    true_r2 = float(1 - (p - y).square().sum() / (y - y.mean()).square().sum())
    true_r = float(torch.corrcoef(torch.stack([p, y]))[0, 1])
    print(spread, "R2", float(r2.compute()), "float64", true_r2, "Pearson", float(pearson.compute()), "float64", true_r)
    assert abs(float(r2.compute()) - true_r2) > least
    assert abs(float(pearson.compute()) - true_r) < 1e-4
PY
