import math

import pytest
import torch

from fed_dpsat.models.mlp import mlp, mlp_small


def test_one_hidden_tanh_unit_by_hand():
    model = mlp((2,), 1, hidden=1)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (2.0, 1.0, 3.0, -1.0), strict=True):
            parameter.fill_(value)
    assert model(torch.tensor([[0.25, -0.25]])).item() == pytest.approx(3 * math.tanh(1) - 1)


def test_hidden_sets_the_width():
    assert sum(p.numel() for p in mlp((64,), 10, hidden=5).parameters()) == 64 * 5 + 5 + 5 * 10 + 10


def test_the_small_one_has_32_hidden_units():
    assert sum(p.numel() for p in mlp_small((1, 28, 28), 10).parameters()) == 784 * 32 + 32 + 32 * 10 + 10 == 25_450


def test_no_hidden_units_are_refused():
    with pytest.raises(ValueError, match=r"hidden=0 is not at least 1; use 'linear'"):
        mlp((64,), 10, hidden=0)


def test_an_empty_shape_is_refused():
    with pytest.raises(ValueError, match=r"model='mlp': input_shape=\(0,\) is not"):
        mlp((0,), 10)
