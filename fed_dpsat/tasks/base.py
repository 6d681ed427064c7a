"""The parts of a task, and what every task of classes, numbers or tokens is made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import DataError
from fed_dpsat.step.gradients.loss import logits_of
from fed_dpsat.tasks.metric import UNDEFINED, Metric, Value


class Measure(ABC):
    """The metrics of one evaluation: ``update`` with each batch, then ``compute``."""

    @abstractmethod
    def update(self, outputs: Any, targets: Tensor) -> None:
        """Add ``outputs[B, ...]`` of the model and ``targets[B, ...]`` of one batch."""

    @abstractmethod
    def compute(self) -> Mapping[str, Value]:
        """By the name of each metric, its value or ``UNDEFINED``."""


class Task(ABC):
    """What a model is for. A task of your own is a subclass, named ``module:attribute``.

    ``metrics`` has the most telling one first: runs show it, and sweeps choose by it. ``labels`` says which labels an
    example has, see ``fed_dpsat.data.dataset.Examples``. ``outputs`` is the number of outputs that the last layer of a
    model has, which a model is given as ``num_classes``. An evaluation takes ``batch_size`` examples at a time.
    """

    name: str
    metrics: tuple[Metric, ...]
    labels: str
    outputs: int
    batch_size: int = 500

    @abstractmethod
    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """``outputs[B, ...], targets[B, ...] -> losses[B]``; the loss of an example depends on its own row alone."""

    @abstractmethod
    def measure(self) -> Measure:
        """A new ``Measure`` of ``metrics``."""

    def expected(self, count: int) -> str:
        """The shape of the outputs for ``count`` examples, in words."""
        return f"[{count}, {self.outputs}]"

    def fits(self, outputs: Tensor, count: int) -> bool:
        """Whether ``outputs`` of ``count`` examples have the shape that ``loss`` takes."""
        return outputs.ndim == 2 and len(outputs) == count and outputs.shape[1] >= self.outputs

    def check(self, dataset: Dataset) -> None:
        """Raise ``DataError`` for a data set whose labels are not those of this task."""
        for split, examples in (("training", dataset.train), ("test", dataset.test)):
            if (found := kind_of(examples)) != self.labels:
                raise DataError(
                    f"task={self.name!r} needs {self.labels} for each example, and the {split} split of {dataset.name} "
                    f"has {found}; set task={_SUGGESTED[found]}, or another label_column"
                )


CLASS, CLASSES, NUMBERS = "a class (int64)", "several classes (uint8 [N, K])", "numbers (float32)"
POSITIONS, TEXT = "a class for each position", "its text alone"
_SUGGESTED = {
    CLASS: "classification",
    CLASSES: "multilabel",
    NUMBERS: "regression",
    POSITIONS: "token-classification",
    TEXT: "causal-lm or masked-lm",
}


def kind_of(examples: Examples) -> str:
    """Which labels ``examples`` have, in words."""
    labels = examples.labels
    if labels is None:
        return TEXT
    if isinstance(labels, Sequences):
        return POSITIONS
    return {torch.int64: CLASS, torch.uint8: CLASSES, torch.float32: NUMBERS}[labels.dtype]


def wide_logits(outputs: Any) -> Tensor:
    """The logits of a model, at least in float32."""
    logits = logits_of(outputs)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def each_mean(losses: Tensor, counted: Tensor) -> Tensor:
    """The mean of each row of ``losses[B, ...]`` over its ``counted[B, ...]`` (bool) entries; 0 for a row of none."""
    losses, counted = losses.flatten(1), counted.flatten(1)
    return losses.where(counted, 0).sum(1) / counted.sum(1).clamp(min=1)


def finite(value: Tensor | float) -> Value:
    """A number, or ``UNDEFINED`` if it is not finite."""
    number = float(value)
    return number if math.isfinite(number) else UNDEFINED


def mean_of(values: Tensor, defined: Tensor) -> Value:
    """The mean of ``values[K]`` over those that are ``defined[K]``; ``UNDEFINED`` without one."""
    kept = values.reshape(-1)[defined]  # torchmetrics gives a number for one class
    return finite(kept.mean()) if len(kept) else UNDEFINED
