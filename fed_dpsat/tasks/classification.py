"""One class for each example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fed_dpsat.step.gradients.loss import cross_entropy
from fed_dpsat.tasks.base import CLASS, Measure, Task, finite, mean_of, wide_logits
from fed_dpsat.tasks.metric import Metric, Value

NAME = "classification"
METRICS = (
    Metric(name="accuracy", label="accuracy", unit="%"),
    Metric(name="balanced_accuracy", label="balanced accuracy", unit="%"),
    Metric(name="macro_f1", label="macro F1", unit="%"),
    Metric(name="auroc", label="AUROC", unit="%"),
    Metric(name="average_precision", label="average precision", unit="%"),
)


class Classification(Task):
    """One class for each example: cross-entropy; accuracy, balanced accuracy, macro F1, AUROC, average precision."""

    name = NAME
    metrics = METRICS
    labels = CLASS

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.outputs = len(class_names)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)

    def measure(self) -> Measure:
        return OfClasses(self.outputs)


class OfClasses(Measure):
    """Metrics of ``logits[B, K]`` (further outputs are left out) and ``classes[B]``.

    Recall, AUROC and average precision are means over the classes that have them: a recall needs an example of the
    class, an average precision one too, an AUROC also one of another class.
    """

    def __init__(self, num_classes: int) -> None:
        from torchmetrics import classification as made

        self._counts = torch.zeros(num_classes, dtype=torch.int64)
        each: dict[str, Any] = {"num_classes": num_classes, "average": None, "validate_args": False}
        self._accuracy = made.MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self._f1 = made.MulticlassF1Score(num_classes, average="macro", validate_args=False)
        self._by_class = {
            "balanced_accuracy": made.MulticlassRecall(**each),
            "auroc": made.MulticlassAUROC(**each),
            "average_precision": made.MulticlassAveragePrecision(**each),
        }

    def update(self, outputs: Any, targets: Tensor) -> None:
        classes, targets = len(self._counts), targets.cpu()
        shares = wide_logits(outputs)[:, :classes].double().cpu().softmax(1)
        self._counts += torch.bincount(targets, minlength=classes)
        for metric in (self._accuracy, self._f1, *self._by_class.values()):
            metric.update(shares, targets)

    def compute(self) -> Mapping[str, Value]:
        total = int(self._counts.sum())
        present, several = self._counts > 0, (self._counts > 0) & (self._counts < total)
        return {
            "accuracy": finite(self._accuracy.compute()),
            "macro_f1": finite(self._f1.compute()),
            **{
                name: mean_of(metric.compute(), several if name == "auroc" else present)
                for name, metric in self._by_class.items()
            },
        }


TASKS = {NAME: Classification}
