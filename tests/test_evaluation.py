from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fed_dpsat.data.dataset import Examples
from fed_dpsat.evaluation import evaluate


def test_accuracy_and_loss_of_a_model_whose_answers_are_known():
    module = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    params = {"1.weight": torch.eye(2) * math.log(3)}  # logits (log 3, 0): probability 3/4 for the hot one
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).view(3, 1, 1, 2)
    examples = Examples(inputs=inputs, labels=torch.tensor([0, 1, 1]), mean=(0.0,), std=(1.0,))
    for batch_size in (1, 2, 500):
        result = evaluate(module, params, examples, batch_size)
        assert result.accuracy == pytest.approx(2 / 3)
        assert result.loss == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3)
        assert result.num_examples == 3
    assert module.training
