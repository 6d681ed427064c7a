"""Every engine's answer to a query against a loop over single examples in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fed_dpsat.params import global_norm, subtract, trainable
from fed_dpsat.step.clipping import AdaptiveClipping, FlatClipping
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.clipping.global_ import GlobalClipping
from fed_dpsat.step.clipping.per_layer import PerLayerClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.query import Query, spread

ENGINES = ["vmap", "planned"]  # "auto" is one of them
FORMS = ["none", "some", "all", "no coordinate"]
C = 0.7


def flat(norms):
    return dict.fromkeys(norms, min(1, C / max(total(norms), 1e-300)))


def automatic(norms):
    return dict.fromkeys(norms, C / (total(norms) + 0.01))


def global_(norms):
    return dict.fromkeys(norms, C / 2 if total(norms) <= 2 else 0)


def per_layer(norms):
    """Layers are "0" and "2"; one without an active coordinate takes no share."""
    layers = {name.split(".")[0] for name in norms}
    of = {layer: total({n: x for n, x in norms.items() if n.split(".")[0] == layer}) for layer in layers}
    bound = C / math.sqrt(len(layers))
    return {name: min(1, bound / max(of[name.split(".")[0]], 1e-300)) for name in norms}


def total(norms):
    return math.sqrt(sum(norm**2 for norm in norms.values()))


RULES = {
    "flat": (FlatClipping(clip_norm=C), flat),
    "automatic": (AutomaticClipping(clip_norm=C), automatic),
    "global": (GlobalClipping(clip_norm=C, global_threshold=2), global_),
    "per-layer": (PerLayerClipping(clip_norm=C), per_layer),
    "adaptive": (AdaptiveClipping(clip_norm=C), flat),
    "unclipped": (FlatClipping(clip_norm=math.inf), lambda norms: dict.fromkeys(norms, 1)),
}
LOSSES = {
    "its own": None,
    "squared": lambda loss: lambda params, x, y: loss(params, x, y).square(),
    "of outputs": lambda loss: lambda params, x, y: loss(params, x, y) + loss.outputs(params, x).square().sum(1),
}


def dense():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def convolution():
    layers = nn.Conv2d(2, 4, 3), nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten()), nn.Linear(4 * 4, 3)
    return nn.Sequential(*layers)


MODELS = {"dense": (dense, (7, 5)), "convolution": (convolution, (7, 2, 4, 4))}


def problem(model, seed=0):
    """Loss in float64, points, and seven examples of three classes."""
    torch.manual_seed(seed)
    make, shape = MODELS[model]
    module = make().double()
    points = [{n: p + 0.5 * torch.randn_like(p) for n, p in trainable(module).items()} for _ in range(3)]
    return ModelLoss(module), points, (torch.randn(shape).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0]))


def masks_of(params, forms, generator):
    """One of ``FORMS`` for each name, in turn."""
    made = {
        "some": lambda p: torch.rand(p.shape, generator=generator) < 0.5,
        "all": lambda p: torch.ones(p.shape, dtype=torch.bool),
        "no coordinate": lambda p: torch.zeros(p.shape, dtype=torch.bool),
    }
    chosen = {name: forms[i % len(forms)] for i, name in enumerate(params)}
    return {name: made[form](params[name]) for name, form in chosen.items() if form != "none"} or None


def loop(loss, query, batch, factors):
    """Full shapes: combine, drop, clip, add; one example and one point after the other."""
    wrapped = query.loss(loss) if query.loss else loss
    whole = {name: torch.zeros_like(p) for name, p in query.points[0][1].items()}
    for x, y in zip(*batch, strict=True):
        example = {name: torch.zeros_like(t) for name, t in whole.items()}
        for weight, point in query.points:
            leaves = {name: p.clone().requires_grad_() for name, p in point.items()}
            found = torch.autograd.grad(wrapped(leaves, x[None], y[None]).sum(), list(leaves.values()))
            for name, g in zip(leaves, found, strict=True):
                example[name] += weight * g
        for name, mask in (query.active or {}).items():
            example[name] *= mask
        gone = {name for name, mask in (query.active or {}).items() if not mask.any()}
        norms = {name: float(g.norm()) for name, g in example.items() if name not in gone}
        factor = factors(norms) if norms else {}
        for name, g in example.items():
            whole[name] += factor.get(name, 0) * g
    return whole


@settings(max_examples=60)
@given(
    model=st.sampled_from(list(MODELS)),
    engine=st.sampled_from([*ENGINES, "auto"]),
    rule=st.sampled_from(list(RULES)),
    loss=st.sampled_from(list(LOSSES)),
    weights=st.just([1.0]) | st.lists(st.floats(-2, 2), min_size=1, max_size=3),
    forms=st.lists(st.sampled_from(FORMS), min_size=1, max_size=4),
    physical=st.sampled_from([1, 2, 3, 7, 100]),
    seed=st.integers(0, 3),
)
def test_a_loop_over_single_examples(model, engine, rule, loss, weights, forms, physical, seed):
    loss_fn, points, batch = problem(model, seed)
    active = masks_of(points[0], forms, torch.Generator().manual_seed(seed))
    query = Query(points=tuple(zip(weights, points, strict=False)), active=active, loss=LOSSES[loss])
    clipping, factors = RULES[rule]
    found, nonfinite = clipped_gradient_sum(
        loss_fn, query, batch, clipping, engine=engine, physical_batch_size=physical
    )
    assert nonfinite == 0
    masks = query.active or {}
    assert {n: t.shape for n, t in found.items()} == {
        n: (int(masks[n].sum()),) if n in masks else p.shape for n, p in points[0].items()
    }
    torch.testing.assert_close(spread(query, found), loop(loss_fn, query, batch, factors), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_one_full_point_gives_the_bits_of_plain_parameters(rule, model, engine, same_bits):
    loss, (point, *_), batch = problem(model)
    expected, _ = clipped_gradient_sum(loss, point, batch, RULES[rule][0], engine=engine, physical_batch_size=3)
    full = {name: torch.ones_like(p, dtype=torch.bool) for name, p in point.items()}
    for active in (None, full):
        query = Query(points=((1.0, point),), active=active)
        found, _ = clipped_gradient_sum(loss, query, batch, RULES[rule][0], engine=engine, physical_batch_size=3)
        assert same_bits(found, expected)


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_points_masks_and_wrapped_losses_take_no_pass_per_example(engine, monkeypatch):
    loss, points, batch = problem("convolution")
    asked = []
    monkeypatch.setattr("fed_dpsat.step.gradients.loop.remember", lambda loss_fn, reason: asked.append(reason))
    active = masks_of(points[0], ["some", "none"], torch.Generator().manual_seed(0))
    for query in (
        Query(points=((0.5, points[0]), (0.5, points[1]))),
        Query(points=((1.0, points[0]),), active=active),
        Query(points=((1.0, points[0]),), loss=LOSSES["squared"]),
    ):
        clipped_gradient_sum(loss, query, batch, RULES["flat"][0], engine=engine)
    assert asked == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"unclipped"}))
@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (3.0, -2.0)])
@pytest.mark.parametrize("forms", [["none"], ["some"], ["some", "none", "no coordinate"]])
def test_no_example_adds_more_than_the_bound(forms, weights, rule, engine):
    """Single examples in float32, with gradients of 1e4 times the bound and of a thousandth of it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    loss = ModelLoss(module, criterion=lambda outputs, y: (outputs * outputs.detach().sign()).sum(1) * y)
    points = [{n: p + 0.1 * torch.randn_like(p) for n, p in trainable(module).items()} for _ in weights]
    active = masks_of(points[0], forms, torch.Generator().manual_seed(1))
    query = Query(points=tuple(zip(weights, points, strict=True)), active=active)
    largest = 0.0
    for scale in (1e-3, 0.1, 1.0, 1e4 * C, 1e6 * C):
        example = torch.randn(1, 6), torch.tensor([scale])
        found, _ = clipped_gradient_sum(loss, query, example, RULES[rule][0], engine=engine)
        norm = float(global_norm({name: g.double() for name, g in found.items()}))
        assert norm <= C * (1 + 1e-6)
        largest = max(largest, norm)
    assert largest > 1e-3 * C


@pytest.mark.parametrize("engine", ENGINES)
def test_leaving_one_example_out_changes_the_sum_by_at_most_the_bound(engine):
    loss, points, (x, y) = problem("dense")
    active = masks_of(points[0], ["some"], torch.Generator().manual_seed(0))
    query = Query(points=((2.0, points[0]), (-1.0, points[1])), active=active)
    clipping = FlatClipping(clip_norm=1e-3)
    whole, _ = clipped_gradient_sum(loss, query, (x, y), clipping, engine=engine)
    for i in range(len(y)):
        rest = [j for j in range(len(y)) if j != i]
        without, _ = clipped_gradient_sum(loss, query, (x[rest], y[rest]), clipping, engine=engine)
        assert float(global_norm(subtract(whole, without))) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip_norm", [1.0, math.inf])
def test_what_is_not_finite_adds_nothing_where_it_is_active(engine, bad, clip_norm):
    """The gradient of an example is the example: bad in its second coordinate, which counts unless that is masked."""
    module = nn.Linear(2, 1, bias=False)
    loss = ModelLoss(module, criterion=lambda outputs, _: outputs[:, 0])
    batch = torch.tensor([[0.5, bad], [0.25, 0.25]]), torch.zeros(2)
    for kept, expected, count in (
        ([True, False], [0.75], 0),
        ([False, True], [0.25], 1),
        ([True, True], [0.25, 0.25], 1),
    ):
        for points in (((1.0, trainable(module)),), ((0.5, trainable(module)), (0.5, trainable(module)))):
            query = Query(points=points, active={"weight": torch.tensor([kept])})
            found, nonfinite = clipped_gradient_sum(
                loss, query, batch, FlatClipping(clip_norm=clip_norm), engine=engine
            )
            assert found["weight"].flatten().tolist() == expected
            assert nonfinite == count


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_could_overflow_are_not_summed_in_an_ordinary_pass(engine):
    """10 times 1e38 is inf in float32: both examples are dropped, though their sum would be 0."""
    module = nn.Linear(1, 1, bias=False)
    loss = ModelLoss(module, criterion=lambda outputs, _: outputs[:, 0])
    batch = torch.tensor([[1e38], [-1e38]]), torch.zeros(2)
    query = Query(points=((10.0, trainable(module)),))
    _, nonfinite = clipped_gradient_sum(loss, query, batch, FlatClipping(clip_norm=math.inf), engine=engine)
    assert nonfinite == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_changed_in_place(engine, same_bits):
    loss, points, batch = problem("dense")
    active = masks_of(points[0], ["some"], torch.Generator().manual_seed(0))
    before = [{name: p.clone() for name, p in params.items()} for params in (*points[:2], active)]
    query = Query(points=((0.5, points[0]), (0.5, points[1])), active=active)
    clipped_gradient_sum(loss, query, batch, RULES["flat"][0], engine=engine, physical_batch_size=2)
    assert all(same_bits(a, b) for a, b in zip((*points[:2], active), before, strict=True))
