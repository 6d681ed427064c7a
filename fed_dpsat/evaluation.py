"""Quality of a model on public data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from fed_dpsat.data.dataset import Examples
from fed_dpsat.params import Params


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy in [0, 1] and mean cross-entropy in nats over ``num_examples``."""

    accuracy: float
    loss: float
    num_examples: int


def evaluate(module: nn.Module, params: Params, examples: Examples, batch_size: int = 500) -> Evaluation:
    """Accuracy and loss of ``module`` at ``params``; a sum over batches in order, so it is reproducible."""
    correct, loss = 0, 0.0
    was_training = module.training
    module.eval()
    with torch.inference_mode():
        for indices in torch.split(torch.arange(len(examples)), batch_size):
            inputs, targets = examples.batch(indices)
            outputs = functional_call(module, params, (inputs,))
            correct += int((outputs.argmax(1) == targets).sum())
            loss += float(functional.cross_entropy(outputs, targets, reduction="sum"))
    module.train(was_training)
    return Evaluation(accuracy=correct / len(examples), loss=loss / len(examples), num_examples=len(examples))
