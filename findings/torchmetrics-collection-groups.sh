#!/usr/bin/env bash
# Packages: torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
# What: `MetricCollection` compares the states of its metrics after the first batch and lets those that are equal
#   share one state from then on. Metrics of one class with different thresholds are equal after a batch that both
#   judge alike.
# A good guess: F1 at the thresholds 0.3 and 0.7 are two numbers, the same in a collection as on their own, whatever
#   the first batch is.
# Seen: after a first batch of two confident examples and then 1,000 random ones, both are 0.407 in the collection;
#   alone they are 0.598 and 0.407. reset() does not undo it. The metric whose name is first in the alphabet wins.
#   With compute_groups=False, or a first batch of 1,000, both are right.
# Why it matters: Clients evaluate in small batches, and the first one decides: the same collection gives right
#   numbers on one client and equal ones on the next. Use compute_groups=False for metrics of one class.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryF1Score

generator = torch.Generator().manual_seed(0)
first = torch.tensor([0.9, 0.1]), torch.tensor([1, 0])
rest = torch.rand(1000, generator=generator), torch.randint(0, 2, (1000,), generator=generator)
thresholds = {"low": 0.3, "high": 0.7}


def found(collection, *batches):
    for scores, labels in batches:
        collection.update(scores, labels)
    return {name: round(float(value), 3) for name, value in collection.compute().items()}


def metrics():
    return {name: BinaryF1Score(threshold=threshold) for name, threshold in thresholds.items()}


alone = {}
for name, metric in metrics().items():
    metric.update(*first)
    metric.update(*rest)
    alone[name] = round(float(metric.compute()), 3)
together = MetricCollection(metrics())
shared = found(together, first, rest)
together.reset()
after_reset = found(together, rest)
print("alone", alone, "together", shared, "after reset", after_reset)
assert alone["low"] - alone["high"] > 0.15
assert shared["low"] == shared["high"] == alone["high"]
assert after_reset["low"] == after_reset["high"]
assert found(MetricCollection(metrics(), compute_groups=False), first, rest) == alone
assert found(MetricCollection(metrics()), rest, first) == alone
PY
