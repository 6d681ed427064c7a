#!/usr/bin/env bash
# Packages: torch==2.13.0, torchmetrics==1.9.0
# What: Macro averages of MulticlassAUROC and MulticlassAveragePrecision on a split in which one of three classes has no
#   example, as a client's own data or a small test split often has.
# A good guess: both leave that class out of the mean, or both count it alike.
# Seen: the AUROC counts the absent class as 0, so the mean of 0.401 and 0.527 is 0.309. The average precision leaves it
#   out: the mean of 0.451 and 0.541 is 0.496. Macro recall counts it as 0 if a prediction names it. Of labels instead of
#   classes, one label without a positive example halves a MultilabelAUROC of two labels (0.299 for 0.599).
# Why it matters: "AUROC below 0.5" of a good model, and fairness tables over clients that compare label skew and not
#   models. A mean over the classes with positive and negative examples is what scikit-learn's definitions give.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torchmetrics.classification import (
    MulticlassAUROC,
    MulticlassAveragePrecision,
    MulticlassRecall,
    MultilabelAUROC,
)

shares = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
classes = torch.arange(60) % 2


def found(metric, targets=classes, outputs=shares):
    metric.update(outputs, targets)
    return metric.compute()


each, mean = found(MulticlassAUROC(3, average=None)), found(MulticlassAUROC(3))
print("AUROC", each.tolist(), float(mean))
assert each[2] == 0 and torch.isclose(mean, each[:2].sum() / 3)

each, mean = found(MulticlassAveragePrecision(3, average=None)), found(MulticlassAveragePrecision(3))
print("average precision", each.tolist(), float(mean))
assert each[2].isnan() and torch.isclose(mean, each[:2].mean())

each, mean = found(MulticlassRecall(3, average=None)), found(MulticlassRecall(3))
print("recall", each.tolist(), float(mean))
assert torch.isclose(mean, each[:2].sum() / 3)

labels = torch.stack([classes, torch.zeros(60, dtype=torch.int64)], 1)
each, mean = found(MultilabelAUROC(2, average=None), labels, shares[:, :2]), found(MultilabelAUROC(2), labels, shares[:, :2])
print("AUROC of labels", each.tolist(), float(mean))
assert torch.isclose(mean, each[0] / 2)
PY
