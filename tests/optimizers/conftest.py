"""What the methods' tests share: private gradients to walk along, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fed_dpsat.optimizers.base import set_clock

STEPS = 50


@pytest.fixture
def vectors():
    """``[51, 3]`` normals: a start and 50 private gradients."""
    return np.random.default_rng(0).standard_normal((STEPS + 1, 3))


@pytest.fixture
def walk():
    """``(optimizer, vectors) -> [(query point, parameters after the step, state)]``, vectors over two tensors."""

    def split(vector):
        return {"a": torch.from_numpy(vector[:2].copy()), "b": torch.from_numpy(vector[2:].copy())}

    def joined(params):
        return np.concatenate([params["a"].numpy(), params["b"].numpy()])

    def go(optimizer, vectors):
        params, gradients = split(vectors[0]), vectors[1:]
        state, seen = set_clock(optimizer.init(params), 0), []
        for gradient in gradients:
            at = joined(optimizer.query_point(params, state))
            params, state = optimizer.update(params, split(gradient), state)
            seen.append((at, joined(params), state))
        return seen

    return go
