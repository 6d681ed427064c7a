"""A module that mixes examples only for some data is found by its operations, not by its results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fed_dpsat.engines.loss import ModelLoss
from fed_dpsat.engines.probe import refusal
from fed_dpsat.params import trainable
from fed_dpsat.plugins import builtin


class Model(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.linear, self.body = nn.Linear(4, 4), body

    def forward(self, x):
        return self.body(self.linear(x))


MIXES = {
    "a branch on the batch": lambda x: x if x.abs().max() < 50 else -3 * x,
    "a threshold of the batch": lambda x: torch.where(x > x.mean(0) + 50, -x, x),
    "another row, for large values only": lambda x: torch.where(x.abs() > 50, x.flip(0), x),
    "a mean": lambda x: x - x.mean(0, keepdim=True),
    "a number read off": lambda x: x * (1.0 if x.sum().item() < 1e6 else 2.0),
    "sorted": lambda x: x.sort(0).values,
    "summed up": lambda x: x.cumsum(0),
    "softmax over the batch": lambda x: x.softmax(0),
    "normalised over the batch": lambda x: nn.functional.normalize(x, dim=0),
    "a matrix of all pairs": lambda x: (x @ x.T) @ x,
}
KEEPS_APART = {
    "elementwise": lambda x: torch.tanh(x).mul(2) + 1,
    "in place": lambda x: x.clone().mul_(2),
    "over features": lambda x: x - x.mean(1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "reshaped": lambda x: x.view(x.shape[0], 2, 2).transpose(1, 2).flatten(1),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "cut and joined": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
    "its own size": lambda x: x / x.size(1),
}


def asked(body):
    loss = ModelLoss(Model(body))
    return refusal(loss, trainable(loss.module), torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("case", MIXES)
def test_what_may_mix_is_refused(case):
    assert asked(MIXES[case])


@pytest.mark.parametrize("case", KEEPS_APART)
def test_what_keeps_examples_apart_is_planned(case):
    assert asked(KEEPS_APART[case]) == ""


@pytest.mark.parametrize("name", builtin("model"))
def test_every_built_in_model_is_planned(name):
    shape = (1, 28, 28) if name in ("dpnasnet-fashion-mnist", "resnet10-gn") else (3, 32, 32)
    loss = ModelLoss(builtin("model")[name](shape, 10))
    assert refusal(loss, trainable(loss.module), torch.randn(2, *shape), torch.zeros(2, dtype=torch.int64)) == ""
