"""One or more numbers for each example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fed_dpsat.data.dataset import Dataset
from fed_dpsat.errors import warn_once
from fed_dpsat.tasks.base import NUMBERS, Measure, Task, finite, wide_logits
from fed_dpsat.tasks.metric import UNDEFINED, Metric, Value

LARGE = 100
"""A scaled target beyond it has a gradient that any usual clip norm cuts to its sign."""


class Regression(Task):
    """Numbers for each example: the mean square of the error, in units of ``label_scale``; RMSE, MAE and R2.

    A model predicts ``(number - mean) / std`` of the declared ``label_scale``, ``(mean, std)`` for each number. Metrics
    are of the numbers themselves; those of several numbers are means over them.
    """

    name = "regression"
    labels = NUMBERS
    metrics = (
        Metric(name="rmse", label="RMSE", higher_is_better=False),
        Metric(name="mae", label="MAE", higher_is_better=False),
        Metric(name="r2", label="R2"),
    )

    def __init__(self, num_labels: int, label_scale: tuple[tuple[float, float], ...]) -> None:
        self.outputs = num_labels
        scale = label_scale or ((0.0, 1.0),) * num_labels
        self._mean, self._std = torch.tensor(scale, dtype=torch.float32).T

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        found, wanted = self.compared(outputs, targets)
        return (found - wanted).square().mean(1)

    def compared(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, K]`` each: the numbers that a model gives, and scaled targets."""
        found = self._numbers(wide_logits(outputs))
        return found, self._scaled(targets.to(found.dtype))

    def fits(self, outputs: Tensor, count: int) -> bool:
        return super().fits(outputs, count) or (self.outputs == 1 and tuple(outputs.shape) == (count,))

    def measure(self) -> Measure:
        return OfNumbers(self)

    def check(self, dataset: Dataset) -> None:
        super().check(dataset)
        labels = dataset.test.labels
        # of the test split, and without the number: with validation_share it is of private examples
        if isinstance(labels, Tensor) and bool((self._scaled(labels).abs() > LARGE).any()):
            warn_once(
                f"targets of {dataset.name} are above {LARGE} after scaling: the gradient of almost each example is "
                "longer than clip_norm, so clipping keeps its direction but not its length, and training is slow; "
                "declare mean and std of the label (in columns_file, or label_scale of a Dataset), so that scaled "
                "targets are about 1"
            )

    def unscaled(self, outputs: Tensor) -> Tensor:
        """``[B, K]``: outputs of a model as numbers in the units of the labels."""
        found = self._numbers(wide_logits(outputs))
        numbers: Tensor = found * self._std.to(found) + self._mean.to(found)
        return numbers

    def _numbers(self, outputs: Tensor) -> Tensor:
        return outputs.view(-1, 1) if outputs.ndim == 1 else outputs[:, : self.outputs]

    def _scaled(self, targets: Tensor) -> Tensor:
        targets = targets.view(-1, 1) if targets.ndim == 1 else targets
        scaled: Tensor = (targets - self._mean.to(targets)) / self._std.to(targets)
        return scaled


class OfNumbers(Measure):
    """Metrics of the outputs of a model and ``targets[B]`` or ``[B, K]``; R2 needs two targets that differ."""

    def __init__(self, task: Regression) -> None:
        from torchmetrics import regression as made

        self._task, self._count = task, 0
        self._low, self._high = torch.full((task.outputs,), torch.inf), torch.full((task.outputs,), -torch.inf)
        self._squares = made.MeanSquaredError(squared=False, num_outputs=task.outputs)
        self._distances = made.MeanAbsoluteError(num_outputs=task.outputs)
        self._r2 = made.R2Score(multioutput="raw_values")

    def update(self, outputs: Any, targets: Tensor) -> None:
        numbers = self._task.unscaled(outputs).double().cpu()
        targets = targets.view(-1, self._task.outputs).double().cpu()
        self._count += len(targets)
        self._low, self._high = torch.minimum(self._low, targets.amin(0)), torch.maximum(self._high, targets.amax(0))
        for metric in (self._squares, self._distances, self._r2):
            metric.update(numbers, targets)

    def compute(self) -> Mapping[str, Value]:
        defined = self._count > 1 and bool((self._low < self._high).all())
        return {
            "rmse": finite(self._squares.compute().mean()),
            "mae": finite(self._distances.compute().mean()),
            "r2": finite(self._r2.compute().mean()) if defined else UNDEFINED,
        }


TASKS = {"regression": Regression}
