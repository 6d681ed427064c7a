#!/usr/bin/env bash
# Packages: torchmetrics==1.9.0 torch==2.13.0 scikit-learn==1.9.1 numpy==2.4.6
# What: `BinaryAUROC` applies a sigmoid to a batch if one of its values is outside [0, 1], batch by batch: small
#   batches of logits that happen to lie within stay as they are, and are ranked against the others' probabilities.
# A good guess: The AUROC depends on the order of all scores, not on how they came in: scikit-learn's value for any
#   batch size.
# Seen: 400 logits: all at once 0.7707, as scikit-learn; four at a time 0.748.
# Why it matters: Clients evaluate in batches of their own sizes, so the metric of one model differs between
#   clients, and between a federation and a single machine. Apply the sigmoid yourself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torchmetrics==1.9.0 torch==2.13.0 scikit-learn==1.9.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from sklearn.metrics import roc_auc_score
from torchmetrics.classification import BinaryAUROC

torch.manual_seed(0)
logits = torch.randn(400) * 0.7 + 0.5
target = (logits + torch.randn(400) > 0.5).long()
right = roc_auc_score(target, logits)
got = {}
for size in (400, 4):
    metric = BinaryAUROC()
    for start in range(0, 400, size):
        metric.update(logits[start : start + size], target[start : start + size])
    got[size] = metric.compute().item()
print(right, got)
assert abs(got[400] - right) < 1e-4
assert abs(got[4] - right) > 0.01
PY
