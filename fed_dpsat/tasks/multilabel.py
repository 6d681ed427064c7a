"""Several classes at once for each example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.tasks.base import CLASSES, Measure, Task, finite, mean_of, wide_logits
from fed_dpsat.tasks.metric import Metric, Value


class Multilabel(Task):
    """Several classes for each example: binary cross-entropy, the mean over classes; macro F1, AUROC and others."""

    name = "multilabel"
    labels = CLASSES
    metrics = (
        Metric(name="macro_f1", label="macro F1", unit="%"),
        Metric(name="auroc", label="AUROC", unit="%"),
        Metric(name="average_precision", label="average precision", unit="%"),
        Metric(name="accuracy", label="accuracy of a label", unit="%"),
    )

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.outputs = len(class_names)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        logits = wide_logits(outputs)[:, : self.outputs]
        return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none").mean(1)

    def measure(self) -> Measure:
        return OfLabels(self.outputs)


class OfLabels(Measure):
    """Metrics of ``logits[B, K]`` and ``targets[B, K]`` of 0 and 1; means over the classes that have them.

    An F1 needs an example that is or is said to be of the class, an average precision one that is, and an AUROC also
    one that is not.
    """

    def __init__(self, num_labels: int) -> None:
        from torchmetrics import classification as made

        each: dict[str, Any] = {"num_labels": num_labels, "average": None, "validate_args": False}
        self._positive, self._said = torch.zeros(num_labels), torch.zeros(num_labels)
        self._total = 0
        self._accuracy = made.MultilabelAccuracy(num_labels, average="micro", validate_args=False)
        self._by_label = {
            "macro_f1": made.MultilabelF1Score(**each),
            "auroc": made.MultilabelAUROC(**each),
            "average_precision": made.MultilabelAveragePrecision(**each),
        }

    def update(self, outputs: Any, targets: Tensor) -> None:
        shares = wide_logits(outputs)[:, : len(self._positive)].double().cpu().sigmoid()
        whole = targets.long().cpu()
        self._positive += whole.sum(0)
        self._said += (shares > 0.5).sum(0)
        self._total += len(whole)
        for metric in (self._accuracy, *self._by_label.values()):
            metric.update(shares, whole)

    def compute(self) -> Mapping[str, Value]:
        present = self._positive > 0
        defined = {
            "macro_f1": present | (self._said > 0),
            "auroc": present & (self._positive < self._total),
            "average_precision": present,
        }
        found = {name: mean_of(metric.compute(), defined[name]) for name, metric in self._by_label.items()}
        return {**found, "accuracy": finite(self._accuracy.compute())}


TASKS = {"multilabel": Multilabel}
