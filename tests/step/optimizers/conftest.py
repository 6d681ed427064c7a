"""What the methods' tests share: private gradients to walk along, and a problem with gradients to write down."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import clipped_gradient_sum
from fed_dpsat.step.query import spread
from fed_dpsat.testing.problems import step_info

STEPS, BATCH, FEATURES, CLASSES, ROUND = 50, 6, 4, 3, 5


class Softmax:
    """Cross-entropy of a linear map without bias, ``{"first": [2, F], "rest": [K - 2, F]}``."""

    def __call__(self, params, inputs, targets):
        return self.criterion(self.outputs(params, inputs), targets)

    def outputs(self, params, inputs):
        return inputs @ torch.cat([params["first"], params["rest"]]).T

    def criterion(self, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


class Problem:
    """50 batches and draws of noise, all in float64, and what a paper's algorithm needs in numpy."""

    clip_norm, noise_multiplier, lr = 0.4, 0.5, 0.3

    def __init__(self):
        generator = np.random.default_rng(0)
        self.start = generator.normal(size=(CLASSES, FEATURES))
        self.inputs = generator.normal(size=(STEPS, BATCH, FEATURES))
        self.targets = generator.integers(CLASSES, size=(STEPS, BATCH))
        self.noise = generator.normal(size=(STEPS, CLASSES, FEATURES)) * self.noise_multiplier * self.clip_norm
        self.loss = Softmax()

    def params(self, w):
        w = torch.from_numpy(np.array(w))
        return {"first": w[:2], "rest": w[2:]}

    def flat(self, params):
        return torch.cat([params["first"], params["rest"]]).numpy()

    def probabilities(self, w, x, temperature=1.0):
        z = w @ x / temperature
        e = np.exp(z - z.max())
        return e / e.sum()

    def gradient(self, w, x, y):
        """Of one example."""
        return np.outer(self.probabilities(w, x) - np.eye(CLASSES)[y], x)

    def value(self, w, x, y):
        return -np.log(self.probabilities(w, x)[y])

    def clipped(self, g):
        return g / max(1, np.linalg.norm(g) / self.clip_norm)

    def examples(self, step):
        return zip(self.inputs[step], self.targets[step], strict=True)

    def private(self, step, gradient, active=1.0):
        """The noised mean of clipped ``gradient(x, y)``; noise on ``active`` alone."""
        total = sum(self.clipped(gradient(x, y)) for x, y in self.examples(step))
        return (total + self.noise[step] * active) / BATCH

    def walk(self, optimizer, state=None):
        """``w`` after each of 50 steps of the library's optimizer, with torch seeded by the number of the step."""
        params = self.params(self.start)
        state = optimizer.init(params) if state is None else state
        for step in range(STEPS):
            torch.manual_seed(step)
            at = optimizer.query_point(params, state, step_info(step, round=step // ROUND + 1))
            batch = torch.from_numpy(self.inputs[step]), torch.from_numpy(self.targets[step])
            total, _ = clipped_gradient_sum(self.loss, at, batch, FlatClipping(clip_norm=self.clip_norm), engine="vmap")
            noisy = {name: g + self.drawn(step, name, g, at) for name, g in total.items()}
            private = {name: g / BATCH for name, g in noisy.items()}
            params, state = optimizer.update(
                params, spread(at, private), state, step_info(step, round=step // ROUND + 1)
            )
            yield self.flat(params)

    def drawn(self, step, name, total, at):
        """The noise of ``step`` at the coordinates of ``total``."""
        whole = self.params(self.noise[step])
        if name not in whole:
            return whole["first"].flatten()[0]
        masks = getattr(at, "active", None) or {}
        return whole[name][masks[name]] if name in masks else whole[name]


@pytest.fixture
def problem():
    return Problem()


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
        state, seen = optimizer.init(params), []
        for step, gradient in enumerate(gradients):
            info = step_info(step)
            at = joined(optimizer.query_point(params, state, info))
            params, state = optimizer.update(params, split(gradient), state, info)
            seen.append((at, joined(params), state))
        return seen

    return go
