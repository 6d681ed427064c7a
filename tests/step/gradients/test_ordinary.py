"""Without bound and noise the loss is divided: the same mean, the same examples left out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fed_dpsat.params import trainable
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.ordinary import Ordinary
from fed_dpsat.step.gradients.per_example import ModelLoss
from fed_dpsat.step.loop import Streams, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers import DPSGD
from fed_dpsat.step.query import Query
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.unchecked import unchecked

UNBOUNDED = FlatClipping(clip_norm=math.inf)
SIZE = 8
X = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def mechanism(noise_multiplier=0.0, clip_norm=math.inf, expected_batch_size=float(SIZE)):
    return GaussianMechanism(
        noise_multiplier=noise_multiplier, clip_norm=clip_norm, expected_batch_size=expected_batch_size
    )


def step(optimizer, module, inputs=X, targets=Y):
    """One step on all examples."""
    params = trainable(module)
    return train_locally(
        params,
        lambda indices: (inputs[indices], targets[indices]),
        loss_fn=ModelLoss(module),
        optimizer=optimizer,
        state=optimizer.init(params),
        sampler=PoissonSampler(num_examples=len(inputs), sample_rate=1.0),
        clipping=UNBOUNDED,
        mechanism=mechanism(expected_batch_size=float(len(inputs))),
        local_steps=1,
        streams=Streams(seed=0, client=0, round=1),
    )


def expected(module, loss):
    """The weights minus half the gradient of ``loss(losses[B])``."""
    leaves = dict(module.named_parameters())
    total = loss(nn.functional.cross_entropy(module(X), Y, reduction="none"))
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {name: p.detach() - 0.5 * g for (name, p), g in zip(leaves.items(), gradients, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Squared(DPSGD):
    """Asks for the gradient of the squared loss, which half the loss has a quarter of."""

    def query_point(self, params, state, info):
        return Query(points=((1.0, params),), loss=lambda loss_fn: lambda p, x, y: loss_fn(p, x, y).square())


@dataclass(frozen=True, kw_only=True)
class TwoPoints(DPSGD):
    def query_point(self, params, state, info):
        return Query(points=((0.5, params), (0.5, {name: p + 0 for name, p in params.items()})))


@pytest.mark.parametrize(
    ("optimizer", "loss"),
    [
        (DPSGD(lr=0.5), lambda losses: losses.sum() / SIZE),
        (TwoPoints(lr=0.5), lambda losses: losses.sum() / SIZE),
        (Squared(lr=0.5), lambda losses: losses.square().sum() / SIZE),
    ],
)
def test_the_step_is_along_the_mean_of_what_is_asked(optimizer, loss):
    module = network()
    with unchecked():  # of a loss that is not this library's
        found = step(optimizer, module).params
    torch.testing.assert_close(found, expected(module, loss), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_example_without_a_finite_gradient_is_left_out_and_counted(bad):
    module, inputs = network(), X.clone()
    inputs[2, 0] = bad
    result = step(DPSGD(lr=0.5), module, inputs)
    others = [0, 1, 3, 4, 5, 6, 7]
    want = expected(module, lambda losses: losses[others].sum() / SIZE)
    assert result.nonfinite_examples == 1
    assert result.event.noise_multiplier == 0
    torch.testing.assert_close(result.params, want, rtol=1e-6, atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class Another(GaussianMechanism):
    """May do what it likes."""


def test_it_is_for_what_is_neither_bounded_nor_noised():
    loss = ModelLoss(network())
    bounded = FlatClipping(clip_norm=1.0)
    another = Another(noise_multiplier=0.0, clip_norm=math.inf, expected_batch_size=8.0)
    assert Ordinary.of(loss, UNBOUNDED, mechanism()) is not None
    assert Ordinary.of(loss, bounded, mechanism(clip_norm=1.0)) is None
    assert Ordinary.of(loss, bounded, mechanism(noise_multiplier=0.1, clip_norm=1.0)) is None
    assert Ordinary.of(loss, UNBOUNDED, mechanism(noise_multiplier=0.1, clip_norm=1.0)) is None
    assert Ordinary.of(loss, UNBOUNDED, another) is None
    assert Ordinary.of(lambda params, inputs, targets: inputs, UNBOUNDED, mechanism()) is None
