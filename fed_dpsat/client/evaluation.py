"""Quality of a model on a test split: loss and metrics; of classes also calibration, by class and by client."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fed_dpsat.data.dataset import Examples
from fed_dpsat.params import Params
from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.generators import seed, training_on
from fed_dpsat.step.gradients.call import call
from fed_dpsat.step.gradients.loss import logits_of
from fed_dpsat.step.modes import in_mode
from fed_dpsat.step.placement import device_of, moved
from fed_dpsat.tasks.base import Measure, Task, finite
from fed_dpsat.tasks.classification import Classification
from fed_dpsat.tasks.metric import UNDEFINED, Value

Predictions = list[tuple[Tensor, Tensor]]
"""``(logits[B, K], labels[B])``, batch by batch."""

CALIBRATION_BINS = 15
"""Equal-width bins of confidence, as in Guo et al. 2017, section 5."""


def measured_on(config: RunConfig) -> str:
    """The examples that a run evaluates on, in words."""
    if config.evaluate == "clients":
        return "examples that clients hold out, with noise"
    return "validation examples held out of the training split" if config.validation_share else "public test split"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of a task by name, and the mean loss in nats, or in the units of the task, over ``num_examples``."""

    values: Mapping[str, Value]
    loss: float
    num_examples: int

    @property
    def accuracy(self) -> float:
        """In [0, 1], of a task of classes."""
        return float(self.values["accuracy"])


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Examples with a confidence in ``(low, high]``: their count, mean confidence and accuracy."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """Accuracy on the ``count`` test examples of one class; None without one."""

    count: int
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A model on ``num_examples``, of which ``num_nonfinite`` had no finite output.

    ============ ==================================================================================
    field        definition, range
    ============ ==================================================================================
    nll          mean of ``-log p(label)`` in nats, the loss of ``Evaluation``
    brier        mean of ``sum_k (p_k - [label is k])^2``, [0, 2]; Brier 1950, equation 2
    ece          ``sum_b n_b / n |accuracy_b - confidence_b|``, [0, 1]; Guo et al. 2017, equation 3
    mce          ``max_b |accuracy_b - confidence_b|`` over bins that are not empty; equation 5
    bins         the reliability diagram: ``CALIBRATION_BINS`` of equal width, closed above
    per_class    in the order of the classes
    ============ ==================================================================================

    With an output that is not finite, nll, brier, ece and mce are NaN: they have no value, and bins leave it out.
    """

    num_examples: int
    num_nonfinite: int
    accuracy: float
    nll: float
    brier: float
    ece: float
    mce: float
    bins: tuple[Bin, ...]
    per_class: tuple[ClassAccuracy, ...]


def passed(
    module: nn.Module, params: Params, examples: Examples, batch_size: int, see: Callable[[Any, Tensor], None]
) -> None:
    """Call ``see(outputs, targets)`` for each batch of all examples, as ``batches``."""
    for _, outputs, targets in batches(module, params, examples, batch_size, torch.arange(len(examples))):
        see(outputs, targets)


def batches(
    module: nn.Module, params: Params, examples: Examples, batch_size: int, indices: Tensor
) -> Iterator[tuple[Tensor, Any, Tensor]]:
    """``(places, outputs, targets)`` of each batch of ``indices[N]``, in evaluation mode, on the device of ``module``.

    ``places`` are those of the batch in ``indices``, in order; sequences of unequal lengths change the order within
    ``batch_size``. A module that draws random numbers in evaluation mode draws the same ones in each call.
    """
    device = device_of(module)
    params = moved(params, device)
    with torch.inference_mode(), training_on(device), in_mode(module, training=False):
        seed(device, 0)
        for some in torch.split(torch.arange(len(indices)), batch_size):
            for alike in examples.alike(indices[some]):
                places = some[alike]
                inputs, targets = examples.batch(indices[places], device)
                yield places, call(module, params, inputs), targets


def predict(module: nn.Module, params: Params, examples: Examples, batch_size: int = 500) -> Predictions:
    """``(logits[B, K], labels[B])`` of each batch, as ``passed``."""
    found: Predictions = []
    passed(module, params, examples, batch_size, lambda outputs, labels: found.append((logits_of(outputs), labels)))
    return found


def evaluate(module: nn.Module, params: Params, examples: Examples, task: Task) -> Evaluation:
    """The metrics and the loss of ``module`` at ``params``; batches are forgotten one after the other.

    Without an example, and of outputs that are not finite, metrics are ``UNDEFINED``.
    """
    measure, losses, whole = task.measure(), list[float](), True

    def see(outputs: Any, targets: Tensor) -> None:
        nonlocal whole
        losses.append(float(task.loss(outputs, targets).double().sum()))
        whole = whole and math.isfinite(losses[-1])
        if whole:
            measure.update(outputs, targets)

    passed(module, params, examples, task.batch_size, see)
    whole = whole and bool(losses)
    loss = math.fsum(losses) / len(examples) if whole else math.nan
    return Evaluation(values=_values(task, measure if whole else None), loss=loss, num_examples=len(examples))


def shown(task: Task) -> list[str]:
    """The names of the metrics that each round shows."""
    names = [metric.name for metric in task.metrics]
    return list(dict.fromkeys([names[0], "accuracy"])) if type(task) is Classification else names


def measured(
    module: nn.Module, params: Params, examples: Examples, task: Task
) -> tuple[Evaluation, Predictions | None]:
    """How good ``params`` are, by the metrics that each round shows; of classes, the predictions too.

    The metrics of classes beside accuracy are for the end of a run (``quality_of``), unless ``metric`` names one.
    """
    if type(task) is not Classification:  # a subclass may have another loss
        return evaluate(module, params, examples, task), None
    predictions = predict(module, params, examples)
    found, first = evaluation_of(predictions), task.metrics[0].name
    if first != "accuracy":
        values = metrics_of(predictions, task)
        found = dataclasses.replace(found, values={first: values[first], **found.values})
    return found, predictions


def metrics_of(predictions: Predictions, task: Task) -> Mapping[str, Value]:
    """All metrics of the ``task`` of ``predictions``."""
    measure, whole = task.measure(), all(bool(outputs.isfinite().all()) for outputs, _ in predictions)
    for outputs, targets in predictions if whole else []:
        measure.update(outputs, targets)
    return _values(task, measure if whole and predictions else None)


def _values(task: Task, measure: Measure | None) -> dict[str, Value]:
    """The metrics in the order of the task, ``UNDEFINED`` without a ``measure``."""
    if measure is None:
        return {metric.name: UNDEFINED for metric in task.metrics}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torchmetrics, about classes that a measure leaves out
        found = measure.compute()
    names = [metric.name for metric in task.metrics]
    if lacking := [name for name in names if name not in found]:
        raise PluginError(f"task={task.name!r}: its measure has no {lacking[0]!r}; return a value of each metric")
    return {name: value if isinstance(value := found[name], str) else finite(value) for name in names}


def evaluation_of(predictions: Predictions) -> Evaluation:
    """Accuracy and loss; a sum over batches in order, so it is reproducible."""
    correct, loss, total = 0, 0.0, 0
    for outputs, labels in predictions:
        correct += int((outputs.argmax(1) == labels).sum())
        loss += float(functional.cross_entropy(outputs, labels, reduction="sum"))
        total += len(labels)
    return Evaluation(values={"accuracy": correct / total}, loss=loss / total, num_examples=total)


def quality_of(predictions: Predictions, num_classes: int) -> Quality:
    """The quality of logits ``[N, K]`` for labels ``[N]``, in double precision; without noise, so for public data."""
    outputs, labels = torch.cat([o for o, _ in predictions]), torch.cat([y for _, y in predictions])
    finite = torch.isfinite(outputs).all(1)
    right = (outputs.argmax(1) == labels).cpu().numpy()
    log_p = functional.log_softmax(outputs.double(), dim=1)
    p, of_label = log_p.exp(), log_p.gather(1, labels.view(-1, 1))
    brier = (p - functional.one_hot(labels, p.shape[1])).square().sum(1).mean()
    bins = reliability(p.max(1).values[finite].cpu().numpy(), right[finite.cpu().numpy()])
    gaps = [
        (b.count, abs(b.accuracy - b.confidence)) for b in bins if b.confidence is not None and b.accuracy is not None
    ]
    whole = bool(finite.all())
    return Quality(
        num_examples=len(labels),
        num_nonfinite=int((~finite).sum()),
        accuracy=float(right.mean()),
        nll=-float(of_label.mean()) if whole else math.nan,
        brier=float(brier) if whole else math.nan,
        ece=math.fsum(count * gap for count, gap in gaps) / len(labels) if whole else math.nan,
        mce=max(gap for _, gap in gaps) if whole else math.nan,
        bins=bins,
        per_class=_per_class(right, labels.cpu().numpy(), num_classes),
    )


def reliability(
    confidences: NDArray[np.float64], right: NDArray[np.bool_], num_bins: int = CALIBRATION_BINS
) -> tuple[Bin, ...]:
    """``confidences[N]`` and whether each was ``right[N]``, in ``num_bins`` of width 1 / num_bins, closed above."""
    at = np.clip(np.ceil(confidences * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(at, minlength=num_bins)
    sure = np.bincount(at, confidences, minlength=num_bins)
    hits = np.bincount(at, right, minlength=num_bins)
    return tuple(
        Bin(
            low=b / num_bins,
            high=(b + 1) / num_bins,
            count=int(counts[b]),
            confidence=float(sure[b] / counts[b]) if counts[b] else None,
            accuracy=float(hits[b] / counts[b]) if counts[b] else None,
        )
        for b in range(num_bins)
    )


def client_accuracies(label_counts: NDArray[np.int64], per_class: Sequence[ClassAccuracy]) -> NDArray[np.float64]:
    """``[clients]``: the expected accuracy on test examples with the label distribution of each client.

    This is the mean of the test accuracies of classes, weighted by ``label_counts[clients, classes]``. The counts are
    private data of a client, so only simulations may use it. NaN for a client with a class that has no test example.
    """
    accuracy = np.array([math.nan if c.accuracy is None else c.accuracy for c in per_class])
    held = np.where(label_counts > 0, label_counts * accuracy, 0.0)
    found: NDArray[np.float64] = held.sum(1) / label_counts.sum(1)
    return found


def worst_decile(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Mean of the lowest tenth of ``values[N]``, at least one; NaN for an empty list."""
    lowest = np.sort(np.asarray(values, dtype=np.float64))[: max(1, math.ceil(len(values) / 10))]
    return float(lowest.mean()) if len(lowest) else math.nan


def gini(values: Sequence[float] | NDArray[np.float64]) -> float:
    """``sum_ij |x_i - x_j| / (2 N^2 mean)`` of ``values[N] >= 0``: 0 if all are equal; NaN for an empty list."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n, total = len(ordered), float(ordered.sum())
    if not n or math.isnan(total):
        return math.nan
    weights = 2 * np.arange(1, n + 1) - n - 1
    return float(weights @ ordered) / (n * total) if total else 0.0


def _per_class(right: NDArray[np.bool_], labels: NDArray[np.int64], num_classes: int) -> tuple[ClassAccuracy, ...]:
    counts = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels, right, minlength=num_classes)
    return tuple(ClassAccuracy(count=int(n), accuracy=float(hits[k] / n) if n else None) for k, n in enumerate(counts))
