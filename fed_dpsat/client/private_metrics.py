"""What an example adds to the evaluation by clients, each line with a norm of at most 1, and the metrics of the totals.

=============== =========================== ======================================================================
line            numbers                     what one example adds
=============== =========================== ======================================================================
``loss``        1                           2 min(loss, ``loss_bound``) / ``loss_bound`` - 1
``accuracy``    1                           1 if the class is right, else -1
``mae``         1                           2 min(error, ``error_bound``) / ``error_bound`` - 1
``confusion``   classes x classes           1 in the cell of its class and the predicted one
``scores``      classes x 2 x ``BINS``      for each class k, 1 / sqrt(classes) in the bin of its share of k, among
                                            the examples of k or among the others
``calibration`` 2 x ``BINS``                1 in the bin of the largest share, among right or wrong predictions
``count``       1                           1: with the unit "client", whose number of examples is private
=============== =========================== ======================================================================

An output that is not finite counts as the largest loss and error, and as shares of 0. Balanced accuracy and macro F1
follow from the confusion matrix, AUROC and average precision from the scores, and the expected calibration error from
its bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.client.totals import Floats
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.releases import named
from fed_dpsat.step.noise import derive_generator
from fed_dpsat.tasks.base import Task, wide_logits
from fed_dpsat.tasks.regression import Regression

BINS = 20
"""Equal bins of shares in [0, 1]."""
DRAWS = 200
"""Fresh noises that say how far the released noise may have moved a metric."""

Vectors = Callable[[Any, Tensor], dict[str, Tensor]]
"""From outputs and targets of ``B`` examples to ``[B, d]`` by line."""


def lines_of(config: RunConfig) -> list[str]:
    """The lines of an evaluation, in order."""
    own = ["accuracy" if config.task == "classification" else "mae", *named(config.evaluation_metrics)]
    return ["loss", *own, *(["count"] if config.privacy_unit == "client" else [])]


def released_metrics(config: RunConfig) -> list[str]:
    """The names of the metrics of an evaluation beside the loss, the main one first."""
    names = {
        "accuracy": ("accuracy",),
        "mae": ("mae",),
        "confusion": ("balanced_accuracy", "macro_f1"),
        "scores": ("auroc", "average_precision"),
        "calibration": ("ece",),
    }
    found = [name for line in lines_of(config) for name in names.get(line, ())]
    return sorted(found, key=lambda name: name != config.metric)


def vectors_of(config: RunConfig, task: Task) -> Vectors:
    """The function of one batch: each row depends on its own example alone and has at most norm 1 in each line."""
    lines, classes = lines_of(config), task.outputs

    def vectors(outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        losses, targets = task.loss(outputs, targets).double().cpu(), targets.cpu()
        found = {"loss": centred(losses, config.loss_bound), "count": torch.ones(len(losses), 1, dtype=torch.float64)}
        if isinstance(task, Regression):
            errors = (task.unscaled(outputs).double().cpu() - targets.view(len(targets), -1)).abs().mean(1)
            found["mae"] = centred(errors, config.error_bound)
        else:
            shares = wide_logits(outputs)[:, :classes].double().cpu().softmax(1).nan_to_num(0.0)
            predicted, own = shares.argmax(1), functional.one_hot(targets, classes)
            right = predicted == targets
            found["accuracy"] = (2.0 * right - 1)[:, None].double()
            found["confusion"] = _one_hot(targets * classes + predicted, classes * classes)
            if "scores" in lines:
                places = 2 * bins_of(shares) + (1 - own)
                found["scores"] = (_one_hot(places, 2 * BINS) / math.sqrt(classes)).flatten(1)
            found["calibration"] = _one_hot(2 * bins_of(shares.amax(1)) + (~right).long(), 2 * BINS)
        return {line: found[line] for line in lines}

    return vectors


def centred(values: Tensor, bound: float) -> Tensor:
    """``[B, 1]`` in [-1, 1] of ``values[B]`` in [0, bound]; larger ones, and those that are not finite, are 1."""
    clipped = values.nan_to_num(nan=bound, posinf=bound, neginf=bound).clamp(0.0, bound)
    return (2 * clipped / bound - 1)[:, None]


def bins_of(shares: Tensor) -> Tensor:
    """The bin of each share, int64, shape as given."""
    return (shares * BINS).long().clamp(0, BINS - 1)


@dataclass(frozen=True, kw_only=True)
class Noised:
    """Metrics of an evaluation by clients: ``values`` and the half-widths of their 95 % intervals of the noise."""

    values: Mapping[str, float]
    loss: float
    intervals: Mapping[str, float]
    details: Mapping[str, Any]


def metrics_of_totals(
    totals: Mapping[str, Floats], noise: float, config: RunConfig, num_classes: int, num_examples: int | None
) -> Noised:
    """The metrics of noised ``totals``, each number with a deviation of ``noise``; all of it is post-processing.

    ``num_examples`` is None if it is private: then the line ``count`` stands for it. The half-width of a metric is 1.96
    times its deviation over ``DRAWS`` further noises of the same size, and how far these move its mean: a calibration
    error, as a sum of distances, grows by noise.
    """
    values = _values(totals, config, num_classes, num_examples)
    generator = derive_generator(config.seed, purpose="trial")
    drawn = [
        _values(
            {line: total + noise * generator.standard_normal(len(total)) for line, total in totals.items()},
            config,
            num_classes,
            num_examples,
        )
        for _ in range(DRAWS)
    ]
    intervals = {name: _half_width(value, [one[name] for one in drawn]) for name, value in values.items()}
    loss = values.pop("loss")
    kept = ("confusion", "scores", "calibration")
    details = {line: total.tolist() for line, total in totals.items() if line in kept}
    return Noised(values=values, loss=loss, intervals=intervals, details={**details, "deviation": noise})


def _half_width(value: float, drawn: Sequence[float]) -> float:
    return 1.96 * float(np.std(drawn)) + abs(float(np.mean(drawn)) - value)


def _values(
    totals: Mapping[str, Floats], config: RunConfig, num_classes: int, num_examples: int | None
) -> dict[str, float]:
    count = float(num_examples) if num_examples is not None else max(float(totals["count"][0]), 1e-9)

    def mean(line: str, bound: float) -> float:
        return bound * min(1.0, max(0.0, (float(totals[line][0]) / count + 1) / 2))

    found = {"loss": mean("loss", config.loss_bound)}
    if "accuracy" in totals:
        found["accuracy"] = mean("accuracy", 1.0)
    if "mae" in totals:
        found["mae"] = mean("mae", config.error_bound)
    if "confusion" in totals:
        found |= of_confusion(totals["confusion"].reshape(num_classes, num_classes))
    if "scores" in totals:
        found |= of_scores(totals["scores"].reshape(num_classes, BINS, 2))
    if "calibration" in totals:
        found["ece"] = of_calibration(totals["calibration"].reshape(BINS, 2))
    return found


def of_confusion(counts: Floats) -> dict[str, float]:
    """Balanced accuracy and macro F1 of ``counts[class, predicted]``; a class without a count is left out."""
    right, own, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    there = (own > 0) & (own + predicted > 0)
    recalls = np.clip(right[there] / own[there], 0, 1).tolist()
    scores = np.clip(2 * right[there] / (own + predicted)[there], 0, 1).tolist()
    return {"balanced_accuracy": _mean(recalls, 0.0), "macro_f1": _mean(scores, 0.0)}


def of_scores(counts: Floats) -> dict[str, float]:
    """AUROC and average precision, means over classes, of ``counts[class, bin, (own, others)]``; ties count half."""
    areas, precisions = [], []
    for own, others in counts.transpose(0, 2, 1):
        if own.sum() <= 0 or others.sum() <= 0:
            continue
        below = np.cumsum(others) - others / 2
        areas.append(_share(float((own * below).sum() / (own.sum() * others.sum()))))
        hits, all_of = np.cumsum(own[::-1]), np.cumsum((own + others)[::-1])
        precision = np.clip(np.divide(hits, all_of, out=np.zeros_like(hits), where=all_of > 0), 0, 1)
        precisions.append(_share(float((own[::-1] * precision).sum() / own.sum())))
    return {"auroc": _mean(areas, 0.5), "average_precision": _mean(precisions, 0.0)}


def of_calibration(counts: Floats) -> float:
    """The expected calibration error of ``counts[bin, (right, wrong)]``, with the middle of a bin as its confidence."""
    of_bin = counts.sum(1)
    middle = (np.arange(len(counts)) + 0.5) / len(counts)
    return _share(float(np.abs(counts[:, 0] - middle * of_bin).sum() / max(float(of_bin.sum()), 1e-9)))


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def _mean(values: Sequence[float], without: float) -> float:
    return float(np.mean(values)) if values else without


def _one_hot(places: Tensor, width: int) -> Tensor:
    return functional.one_hot(places, width).double()
