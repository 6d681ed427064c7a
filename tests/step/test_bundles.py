"""Bundles of rows against a loop over single rows in float64: weighted sums first, one norm for all, one factor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpsat.models.cnn import tanh_cnn
from fed_dpsat.models.resnet import WSConv2d
from fed_dpsat.params import global_norm, subtract, trainable, zeros_like
from fed_dpsat.step.bundles import Bundles
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.clipping.per_layer import PerLayerClipping
from fed_dpsat.step.draws import Draws
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.query import Query, Slope

ENGINES = ["vmap", "planned"]
C = 0.3


def bundled_sum(loss, point, inputs, targets, weights, factors):
    """The oracle; ``factors`` maps squared norms by name, ``[1]`` each, to factors."""
    total = zeros_like(point)
    for g, row in enumerate(weights):
        mine = zeros_like(point)
        for r, weight in enumerate(row.tolist()):
            i = slice(g * len(row) + r, g * len(row) + r + 1)
            leaves = {name: p.clone().requires_grad_() for name, p in point.items()}
            found = torch.autograd.grad(loss(leaves, inputs[i], targets[i]).sum(), list(leaves.values()))
            mine = {name: mine[name] + weight * f for name, f in zip(leaves, found, strict=True)}
        of = factors({name: m.square().sum()[None] for name, m in mine.items()})
        total = {name: total[name] + of[name] * m for name, m in mine.items()}
    return total


class Tied(nn.Module):
    """Words through one table and back through it, with a scale of its own."""

    def __init__(self, words=9, width=6):
        super().__init__()
        self.table = nn.Embedding(words, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return nn.functional.linear(self.norm(self.table(x)) * self.scale, self.table.weight).mean(1)


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


class Positions(nn.Module):
    """A linear layer at several positions."""

    def __init__(self, width):
        super().__init__()
        self.first, self.head = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)).mean(1))


def images(*shape):
    return lambda count: torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def words(count):
    return torch.randint(0, 9, (count, 4), generator=torch.Generator().manual_seed(1))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)), images(6)),
    "positions": (lambda: Positions(4), images(7, 5)),
    "many positions": (lambda: Positions(300), images(7, 5)),
    "words": (Tied, words),
    "recurrent": (Last, images(4, 5)),
    "cnn": (lambda: tanh_cnn(num_classes=3, input_shape=(3, 32, 32)), images(3, 32, 32)),
    "few pixels": (
        lambda: nn.Sequential(
            nn.Conv2d(32, 40, 3, padding=1), nn.GroupNorm(4, 40), nn.Tanh(), nn.Flatten(), nn.Linear(360, 3)
        ),
        images(32, 3, 3),
    ),
    "standardised": (
        lambda: nn.Sequential(WSConv2d(8, 64, 3), nn.Tanh(), nn.Flatten(), nn.Linear(256, 3)),
        images(8, 2, 2),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)),
        images(4, 6, 6),
    ),
    "signals": (
        lambda: nn.Sequential(nn.Conv1d(4, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)),
        images(4, 8),
    ),
}
RULES = {
    "flat": FlatClipping(clip_norm=C),
    "automatic": AutomaticClipping(clip_norm=C),
    "per-layer": PerLayerClipping(clip_norm=C),
    "unclipped": FlatClipping(clip_norm=math.inf),
}


def problem(model, bundles=4, rows=3, dtype=torch.float64):
    make, inputs_of = MODELS[model]
    torch.manual_seed(0)
    module, inputs = make().to(dtype), inputs_of(bundles * rows)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    targets = torch.arange(bundles * rows) % 3
    weights = torch.rand(bundles, rows, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights[-1, 1:], weights[0] = 0, 1
    return ModelLoss(module), trainable(module), inputs, targets, weights


def close(found, expected, tolerance=1e-6):
    return float(global_norm(subtract(found, expected))) <= tolerance * max(1, float(global_norm(expected)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.by_default("words-planned", "cnn-planned", "many positions-planned", "few pixels-planned")
def test_equal_the_loop(model, engine):
    loss, params, x, y, weights = problem(model)
    rule = RULES["flat"]
    expected = bundled_sum(loss, params, x, y, weights, rule.factors)
    for size in (1, 7, 128):
        found, nonfinite = clipped_gradient_sum(
            loss, params, (x, y), rule, engine=engine, physical_batch_size=size, bundles=Bundles(weights)
        )
        assert close(found, expected, 5e-3 if engine == "planned" else 1e-6)  # a norm may be 0.4 % above the true one
        assert not nonfinite


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", ["cnn", "few pixels", "standardised", "positions"])
@pytest.mark.by_default("few pixels-per-layer", "positions-unclipped")
def test_equal_the_loop_in_float32(model, rule):
    loss, params, x, y, weights = problem(model)
    expected = bundled_sum(loss, params, x, y, weights, RULES[rule].factors)
    loss, params, x, y, _ = problem(model, dtype=torch.float32)
    found, _ = clipped_gradient_sum(loss, params, (x, y), RULES[rule], bundles=Bundles(weights))
    assert close(found, expected, 5e-3)


def test_every_kind_of_query():
    loss, params, x, y, weights = problem("mlp")
    rule = RULES["flat"]
    twice = {name: 2 * p for name, p in params.items()}
    points = Query(points=((0.5, params), (-1.0, twice)))

    def difference(p, x, y):
        moved = {name: t * 2 for name, t in p.items()}
        return 0.5 * loss(p, x, y) - loss(moved, x, y) / 2

    expected = bundled_sum(difference, params, x, y, weights, rule.factors)
    mask = torch.arange(params["0.bias"].numel()) % 2 == 0
    masked = Query(points=((1.0, params),), active={"0.bias": mask})
    slope = Slope(points=lambda: [(1.0, params), (-1.0, twice)], width=2.0)
    slopes = Query(points=((1.0, {"along": torch.zeros((), dtype=torch.float64)}),), slopes={"along": slope})
    for engine in ENGINES:
        how = {"engine": engine, "bundles": Bundles(weights)}
        assert close(clipped_gradient_sum(loss, points, (x, y), rule, **how)[0], expected)
        found, _ = clipped_gradient_sum(loss, masked, (x, y), FlatClipping(clip_norm=1e6), **how)
        whole = bundled_sum(loss, params, x, y, weights, lambda norms: dict.fromkeys(norms, 1))
        assert torch.allclose(found["0.bias"], whole["0.bias"][mask])
        along, _ = clipped_gradient_sum(loss, slopes, (x, y), rule, **how)
        each = (weights * ((loss(params, x, y) - loss(twice, x, y)) / 2).view_as(weights)).sum(1)
        assert torch.allclose(along["along"], each.clamp(-C, C).sum())


class Branches(nn.Module):
    """What no pass over a batch takes: each row has a pass of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x) if float(x.sum()) > 0 else self.layer(-x)


def test_rows_with_a_pass_each():
    loss, _, x, y, weights = problem("mlp")
    loss = ModelLoss(Branches().double())
    params = trainable(loss.module)
    expected = bundled_sum(loss, params, x, y, weights, RULES["flat"].factors)
    found, _ = clipped_gradient_sum(loss, params, (x, y), RULES["flat"], bundles=Bundles(weights))
    assert close(found, expected)


def test_a_bundle_that_is_not_finite_adds_nothing():
    loss, params, x, y, weights = problem("mlp")
    x[0, 0] = math.inf
    for engine in ENGINES:
        found, nonfinite = clipped_gradient_sum(
            loss, params, (x, y), RULES["flat"], engine=engine, bundles=Bundles(weights)
        )
        rest, _ = clipped_gradient_sum(loss, params, (x[3:], y[3:]), RULES["flat"], bundles=Bundles(weights[1:]))
        assert nonfinite == 1
        assert close(found, rest, 1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bundle_is_never_in_two_chunks(engine):
    """One bundle in a chunk of fewer rows keeps the bound; its rows in two sums, or clipped one by one, do not."""
    loss, params, x, y, _ = problem("mlp", bundles=1, rows=8)
    x, y = x[:1].expand(8, -1), y[:1].expand(8)
    tight, rule = Bundles(torch.ones(1, 8)), FlatClipping(clip_norm=0.01)
    found, _ = clipped_gradient_sum(loss, params, (x, y), rule, engine=engine, physical_batch_size=2, bundles=tight)
    assert float(global_norm(found)) == pytest.approx(0.01, rel=1e-2)
    halves = [
        clipped_gradient_sum(loss, params, (x[i], y[i]), rule, engine=engine, bundles=Bundles(torch.ones(1, 4)))[0]
        for i in (slice(4), slice(4, 8))
    ]
    assert float(global_norm({n: halves[0][n] + halves[1][n] for n in params})) > 0.019
    one_by_one, _ = clipped_gradient_sum(loss, params, (x, y), rule, engine=engine)
    assert float(global_norm(one_by_one)) > 0.079


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_draw_what_they_draw_alone(engine):
    """Dropout of a row follows from its number, whatever bundle or chunk it is in."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 3)).double().train()
    _, _, x, y, weights = problem("mlp")
    loss, params = ModelLoss(module), trainable(module)
    how = {"engine": engine, "bundles": Bundles(weights), "draws": Draws(key=b"k" * 16, ids=np.arange(12))}
    found = [
        clipped_gradient_sum(loss, params, (x, y), RULES["flat"], physical_batch_size=n, **how)[0] for n in (3, 128)
    ]
    assert close(*found, 1e-9)
    again = clipped_gradient_sum(loss, params, (x, y), RULES["flat"], **{**how, "draws": Draws.fresh(12)})[0]
    assert not close(again, found[0])


def test_rows_of_weight_one_are_examples():
    loss, params, x, y, _ = problem("mlp", dtype=torch.float32)
    alone = clipped_gradient_sum(loss, params, (x, y), RULES["flat"])[0]
    found = clipped_gradient_sum(loss, params, (x, y), RULES["flat"], bundles=Bundles(torch.ones(12, 1)))[0]
    assert close(found, alone)


@pytest.mark.parametrize(
    "weights", [torch.ones(3), torch.ones(2, 0), torch.tensor([[1.0, -1.0]]), torch.tensor([[math.inf]])]
)
def test_refuses_other_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        Bundles(weights)


def test_refuses_weights_of_other_rows():
    loss, params, x, y, _ = problem("mlp")
    with pytest.raises(ValueError, match="bundles for a batch of 12"):
        clipped_gradient_sum(loss, params, (x, y), RULES["flat"], bundles=Bundles(torch.ones(4, 2)))
