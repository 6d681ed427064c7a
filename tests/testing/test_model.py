"""check_model passes every shipped model and catches each broken one, and a broken engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fed_dpsat import plugins
from fed_dpsat.step.gradients.per_example import ENGINES
from fed_dpsat.testing import check_model

SHAPES = {"dpnasnet-fashion-mnist": (1, 28, 28)}
GRADIENTS = "gradients_are_those_of_single_examples"


def mlp(*layers):
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 10))


class CentresTheBatch(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Counts(nn.Module):
    """Keeps a running mean that it does not even use."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x


class CountsCalls(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 10)

    def forward(self, x):
        return self.layer(x.clamp_(min=0))


BROKEN = {
    "BatchNorm": (lambda: mlp(nn.BatchNorm1d(8)), "layers_share_no_statistics"),
    "InstanceNorm that tracks": (
        lambda: mlp(nn.InstanceNorm1d(8, track_running_stats=True)),
        "layers_share_no_statistics",
    ),
    "a mean over the batch": (lambda: mlp(CentresTheBatch()), "logits_ignore_the_other_examples"),
    "a running mean": (lambda: mlp(Counts()), "forward_changes_nothing"),
    "a counter": (lambda: mlp(CountsCalls()), "forward_changes_nothing"),
    "a spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 10)),
        "forward_changes_nothing",
    ),
    "an input changed in place": (ChangesItsInput, "forward_changes_nothing"),
    "too few classes": (lambda: nn.Linear(6, 9), "logits_are_one_row_per_example"),
}


def naive_hooks(loss_fn, params, inputs, targets, clipping):
    """Per-example gradients of linear layers from what hooks keep by reference: wrong after an in-place activation."""
    kept, layers = {}, {n: m for n, m in loss_fn.module.named_modules() if isinstance(m, nn.Linear)}
    handles = [m.register_forward_hook(lambda m, x, y, n=n: kept.update({n: (x[0], y)})) for n, m in layers.items()]
    losses = loss_fn.criterion(loss_fn.module(inputs), targets)
    for handle in handles:
        handle.remove()
    outputs = [y for _, y in kept.values()]
    rows = {}
    for (name, (x, _)), g in zip(kept.items(), torch.autograd.grad(losses.sum(), outputs), strict=True):
        rows[f"{name}.weight"], rows[f"{name}.bias"] = torch.einsum("bo,bi->boi", g, x.detach()), g
    factors = clipping.factors({n: g.flatten(1).square().sum(1) for n, g in rows.items()})
    return {n: torch.einsum("b,b...->...", factors[n], g) for n, g in rows.items()}, 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("dpnasnet-cifar", "resnet10-gn") else name
        for name in plugins.builtin("model")
        if not name.startswith(("wrn", "gpt", "gru"))
    ],
)
def test_every_shipped_model_conforms(name):
    shape = SHAPES.get(name, (3, 32, 32))
    factory = plugins.builtin("model")[name]
    assert len(check_model(lambda: factory(input_shape=shape, num_classes=10), input_shape=shape)) == 5


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_caught(case, caught):
    factory, check = BROKEN[case]
    assert caught(check_model, factory, input_shape=(6,)) == check


@pytest.mark.parametrize("engine", ENGINES)
def test_every_shipped_engine_conforms(engine):
    assert GRADIENTS in check_model(lambda: mlp(nn.Tanh()), input_shape=(6,), engine=engine)


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_activations_in_place_do_not_break_ours(engine):
    check_model(lambda: mlp(nn.ReLU(inplace=True)), input_shape=(6,), engine=engine)


@pytest.mark.parametrize("engine", [naive_hooks, "opacus"])
def test_activations_in_place_that_break_hooks_are_caught(engine, caught):
    if engine is naive_hooks:
        check_model(lambda: mlp(nn.ReLU()), input_shape=(6,), engine=engine)
    assert caught(check_model, lambda: mlp(nn.ReLU(inplace=True)), input_shape=(6,), engine=engine) == GRADIENTS


def test_dropout_is_no_mixing():
    check_model(lambda: mlp(nn.Dropout(0.5)), input_shape=(6,))
