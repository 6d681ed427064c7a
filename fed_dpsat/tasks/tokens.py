"""A class for each position of a text: a label of its own, the next token, or a token that was hidden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.data.dataset import Dataset
from fed_dpsat.data.sequences import IGNORED
from fed_dpsat.errors import DataError, ModelError
from fed_dpsat.tasks.base import POSITIONS, TEXT, Measure, Task, each_mean, finite, wide_logits
from fed_dpsat.tasks.metric import UNDEFINED, Metric, Value


class OfPositions(Task):
    """The mean cross-entropy of the positions of an example that have a target; an example without one has loss 0."""

    batch_size = 32

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        logits, wanted = self.aligned(outputs, targets)
        losses = functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORED
        ).view(wanted.shape)
        return each_mean(losses, wanted != IGNORED)

    def aligned(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """``logits[B, T, K]`` and the targets ``[B, T]`` of their positions."""
        return wide_logits(outputs), targets

    def expected(self, count: int) -> str:
        return f"[{count}, length, {self.outputs}]"

    def fits(self, outputs: Tensor, count: int) -> bool:
        return outputs.ndim == 3 and len(outputs) == count and outputs.shape[2] >= self.outputs


class TokenClassification(OfPositions):
    """A class for each position of a text: cross-entropy over positions; accuracy and macro F1."""

    name = "token-classification"
    labels = POSITIONS
    metrics = (
        Metric(name="macro_f1", label="macro F1", unit="%"),
        Metric(name="accuracy", label="accuracy", unit="%"),
    )

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.outputs = len(class_names)

    def aligned(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        return wide_logits(outputs)[..., : self.outputs], targets

    def measure(self) -> Measure:
        return OfTokenClasses(self)


class Language(OfPositions):
    """A model of a text: perplexity is ``exp`` of the mean cross-entropy over all targets of a split."""

    labels = TEXT
    metrics = (
        Metric(name="perplexity", label="perplexity", higher_is_better=False),
        Metric(name="token_accuracy", label="token accuracy", unit="%"),
    )

    def __init__(self, vocabulary_size: int) -> None:
        self.outputs = vocabulary_size

    def measure(self) -> Measure:
        return OfText(self)


class CausalLM(Language):
    """The next token of a text, from those before it: cross-entropy; perplexity and token accuracy."""

    name = "causal-lm"

    def check(self, dataset: Dataset) -> None:
        super().check(dataset)
        if (longest := next(iter(dataset.train.texts.values())).max_length) < 2:
            raise DataError(f"{dataset.name}: texts of max_length={longest} have no next token; raise it to 2 or more")

    def aligned(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = wide_logits(outputs)
        if logits.shape[1] < 2:  # a text of one token has nothing to predict
            return logits, torch.full_like(targets, IGNORED)
        return logits[:, :-1], targets[:, 1:]


class MaskedLM(Language):
    """Tokens that are hidden from the model (BERT): cross-entropy at them alone; perplexity and token accuracy.

    A model gives ``(logits[B, T, V], hidden[B, T])``: it chooses in its forward pass which tokens it does not see, so
    that each example has choices of its own (``transformers:FOLDER`` does).
    Source: Devlin et al. 2019, arXiv 1810.04805, section 3.1.
    """

    name = "masked-lm"

    def aligned(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            raise ModelError("task='masked-lm' needs a model that gives (logits, hidden): name transformers:FOLDER")
        return wide_logits(outputs), targets.where(outputs[1], IGNORED)


class OfTokenClasses(Measure):
    """Metrics over all positions that have a label."""

    def __init__(self, task: TokenClassification) -> None:
        from torchmetrics import classification as made

        self._task, self._count = task, 0
        more: dict[str, Any] = {"ignore_index": IGNORED, "validate_args": False}
        self._accuracy = made.MulticlassAccuracy(task.outputs, average="micro", **more)
        self._f1 = made.MulticlassF1Score(task.outputs, average="macro", **more)

    def update(self, outputs: Any, targets: Tensor) -> None:
        logits, wanted = self._task.aligned(outputs, targets)
        self._count += int((wanted != IGNORED).sum())
        for metric in (self._accuracy, self._f1):
            metric.update(logits.argmax(-1).cpu(), wanted.cpu())

    def compute(self) -> Mapping[str, Value]:
        if not self._count:
            return dict.fromkeys(("accuracy", "macro_f1"), UNDEFINED)
        return {"accuracy": finite(self._accuracy.compute()), "macro_f1": finite(self._f1.compute())}


class OfText(Measure):
    """Metrics over all tokens that have a target.

    Perplexity is not that of torchmetrics, for which a token of probability below 1e-38 has an infinite cross-entropy.
    """

    def __init__(self, task: Language) -> None:
        self._task, self._count, self._right, self._nats = task, 0, 0, 0.0

    def update(self, outputs: Any, targets: Tensor) -> None:
        logits, wanted = self._task.aligned(outputs, targets)
        counted = wanted != IGNORED
        self._count += int(counted.sum())
        self._right += int((logits.argmax(-1) == wanted)[counted].sum())
        self._nats += float(functional.cross_entropy(logits[counted], wanted[counted], reduction="none").double().sum())

    def compute(self) -> Mapping[str, Value]:
        if not self._count:
            return dict.fromkeys(("perplexity", "token_accuracy"), UNDEFINED)
        mean = torch.tensor(self._nats / self._count, dtype=torch.float64)
        return {"perplexity": finite(mean.exp()), "token_accuracy": self._right / self._count}


TASKS = {"token-classification": TokenClassification, "causal-lm": CausalLM, "masked-lm": MaskedLM}
