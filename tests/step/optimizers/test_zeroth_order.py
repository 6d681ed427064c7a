"""Zeroth-order steps against the paper, by hand and over 50 steps; what is clipped and noised is one number."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.params import trainable
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.loop import Streams, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import standard_normals
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.optimizers.base import BASE, subspace_of
from fed_dpsat.step.optimizers.dplis import DPlis
from fed_dpsat.step.optimizers.random_freeze import RandomFreeze
from fed_dpsat.step.optimizers.saf import EPOCHS, MODELS, SAF
from fed_dpsat.step.optimizers.zeroth_order import SCALAR, ZerothOrder
from fed_dpsat.step.query import first_point
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.subspace import Span, direction
from fed_dpsat.testing.problems import step_info


def norms():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.LayerNorm(200), nn.Linear(200, 3)
    )


class Recurrent(nn.Module):
    """An LSTM over rows."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(20, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.lstm(x.transpose(1, 2).flatten(2))[0][:, -1])


W = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}


def zeroth(base=None, **settings):
    return ZerothOrder(base=base or DPSGD(lr=0.3), **{"seed": 0, "steps_per_round": 5, **settings})


def test_by_hand():
    """f = a^2 + 3 b at (1, 2) along u: ((a + mu u0)^2 - (a - mu u0)^2 + 6 mu u1) / (2 mu) = 2 a u0 + 3 u1."""
    optimizer = zeroth(DPSGD(lr=0.5), smoothing=0.25)
    state = optimizer.init(W)
    u0, u1 = direction(0, 0, 2).tolist()
    assert u0**2 + u1**2 == pytest.approx(2)
    at = optimizer.query_point(W, state, step_info())
    assert at.points[0][1].keys() == {SCALAR}

    def loss(params, inputs, targets):
        return (params["a"] ** 2 + 3 * params["b"]).expand(len(inputs))

    batch = torch.zeros(1, 1), torch.zeros(1)
    total, _ = clipped_gradient_sum(loss, at, batch, FlatClipping(clip_norm=100))
    assert total[SCALAR].item() == pytest.approx(2 * u0 + 3 * u1, rel=1e-5)
    clipped, _ = clipped_gradient_sum(loss, at, batch, FlatClipping(clip_norm=0.5))
    assert abs(clipped[SCALAR].item()) == pytest.approx(min(0.5, abs(2 * u0 + 3 * u1)))
    moved, _ = optimizer.update(W, {SCALAR: torch.tensor(4.0)}, state, step_info())
    assert [float(p) for p in moved.values()] == pytest.approx([1 - 0.5 * 4 * u0, 2 - 0.5 * 4 * u1])


def test_fifty_steps_of_the_paper(problem):
    mu, w = 0.01, problem.start
    optimizer = zeroth(DPSGD(lr=problem.lr / 4), smoothing=mu)
    for step, ours in enumerate(problem.walk(optimizer)):
        u = direction(0, step, 12).double().numpy().reshape(3, 4)
        numbers = [
            (problem.value(w + mu * u, x, y) - problem.value(w - mu * u, x, y)) / (2 * mu)
            for x, y in problem.examples(step)
        ]
        total = sum(np.clip(number, -problem.clip_norm, problem.clip_norm) for number in numbers)
        w = w - problem.lr / 4 * (total + problem.noise[step].flat[0]) / 6 * u
        np.testing.assert_allclose(ours, w, rtol=1e-7, atol=1e-9)


def test_it_learns(problem):
    """Without noise or bound it follows projections of the gradient, and the loss falls."""
    x, y = torch.from_numpy(problem.inputs[:10].reshape(-1, 4)), torch.from_numpy(problem.targets[:10].reshape(-1))
    optimizer = zeroth(DPSGD(lr=0.2))
    params = problem.params(problem.start)
    state, first = optimizer.init(params), float(problem.loss(params, x, y).mean())
    for step in range(60):
        total, _ = clipped_gradient_sum(
            problem.loss,
            optimizer.query_point(params, state, step_info(step)),
            (x, y),
            FlatClipping(clip_norm=1e9),
            engine="vmap",
        )
        params, state = optimizer.update(params, {SCALAR: total[SCALAR] / len(x)}, state, step_info(step))
    assert float(problem.loss(params, x, y).mean()) < 0.75 * first


def test_one_number_is_noised_whatever_the_size_of_the_model():
    params = {"w": torch.zeros(1000)}
    optimizer = zeroth()
    state = optimizer.init(params)
    total, _ = clipped_gradient_sum(
        lambda p, x, y: x @ p["w"],
        optimizer.query_point(params, state, step_info()),
        (torch.ones(2, 1000), torch.zeros(2)),
        FlatClipping(clip_norm=1),
    )
    assert {name: t.shape for name, t in total.items()} == {SCALAR: ()}
    mechanism = GaussianMechanism(noise_multiplier=1, clip_norm=1, expected_batch_size=2)
    private = mechanism.privatize(total, np.random.default_rng(0))
    expected = (float(total[SCALAR]) + float(standard_normals(np.random.default_rng(0), 1))) / 2
    assert float(private[SCALAR]) == pytest.approx(expected, rel=1e-6)
    moved, _ = optimizer.update(params, private, state, step_info())
    torch.testing.assert_close(moved["w"], -0.3 * private[SCALAR] * direction(0, 0, 1000))


def test_the_round_is_in_the_span_of_its_directions_unless_the_base_adds_to_it():
    assert zeroth().subspace(3, 10) == Span(seed=0, first=10, steps=5)
    for base in (DPSGD(lr=1, momentum=0.9), DPSGD(lr=1, weight_decay=0.1), DPlis(base=DPSGD(lr=1, momentum=0.5))):
        assert zeroth(base).subspace(3, 10) is None


def test_around_random_freeze_it_looks_along_active_coordinates_and_moves_no_other():
    base = RandomFreeze(base=DPSGD(lr=1), seed=0, steps_per_round=5, total_steps=50, freeze_rate=0.5, freeze_ramp=0)
    optimizer, params = zeroth(base), {"w": torch.zeros(8)}
    state, active = optimizer.init(params), base.subspace(1, 8).active(8)
    seen = []

    def loss(p, x, y):
        seen.append(p["w"])
        return p["w"].sum().expand(len(x))

    clipped_gradient_sum(
        loss,
        optimizer.query_point(params, state, step_info()),
        (torch.zeros(1, 1), torch.zeros(1)),
        FlatClipping(clip_norm=1),
    )
    assert all(torch.equal(w != 0, active) for w in seen)
    moved, _ = optimizer.update(params, {SCALAR: torch.tensor(1.0)}, state, step_info())
    assert torch.equal(moved["w"] != 0, active)
    assert subspace_of(optimizer, 1, 8) == base.subspace(1, 8)


class Sign(DPSGD):
    """Without a state, and without a count of steps."""

    def init(self, params):
        return {}

    def update(self, params, private_gradient, state, info):
        return {name: p - self.lr * private_gradient[name].sign() for name, p in params.items()}, state


def test_over_a_base_without_a_state_each_step_has_its_own_direction():
    """Two steps of a round in the loop, from which the base learns nothing but the step."""
    optimizer, params = zeroth(Sign(lr=1.0)), {"w": torch.zeros(500)}
    result = train_locally(
        params,
        lambda indices: (torch.ones(len(indices), 500), torch.zeros(len(indices))),
        loss_fn=lambda p, x, y: x @ p["w"],
        optimizer=optimizer,
        state=optimizer.init(params),
        sampler=PoissonSampler(num_examples=4, sample_rate=1.0),
        clipping=FlatClipping(clip_norm=1.0),
        mechanism=GaussianMechanism(noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=4),
        local_steps=2,
        first_step=6,
        streams=Streams(seed=0, client=0, round=4),
    )
    one, two = (direction(0, step, 500).sign() for step in (6, 7))
    assert any(torch.equal(result.params["w"], a * one + b * two) for a in (1, -1) for b in (1, -1))
    assert not any(torch.equal(result.params["w"], a * one) for a in (0, 2, -2))


def test_saf_may_be_on_either_side(problem):
    """The wrapped losses nest: both orders give the same number."""
    params = problem.params(problem.start)
    old = {name: p + 1 for name, p in params.items()}
    found = []
    for optimizer in (
        SAF(base=zeroth(), sample_rate=1, saf_epochs=1),
        zeroth(SAF(base=DPSGD(lr=0.3), sample_rate=1, saf_epochs=1)),
    ):
        state, known = optimizer.init(params), {MODELS: {"0": old}, EPOCHS: {"0": torch.tensor(0)}}
        state = {**state, **known} if isinstance(optimizer, SAF) else {BASE: {**state[BASE], **known}}
        batch = torch.from_numpy(problem.inputs[0]), torch.from_numpy(problem.targets[0])
        total, _ = clipped_gradient_sum(
            problem.loss,
            optimizer.query_point(params, state, step_info(3)),
            batch,
            FlatClipping(clip_norm=1),
            engine="vmap",
        )
        found.append(float(total[SCALAR]))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_method_that_climbs_in_parameter_space_is_refused_around_it():
    for outer in (DPSAT(base=zeroth(), rho=0.1), DPlis(base=zeroth(), radius=0.1)):
        with pytest.raises(
            SettingError, match=r"is not possible around a base whose private gradient is of \['along'\]"
        ):
            outer.query_point(W, outer.init(W), step_info())


def slope_of(x, at):
    """The numbers of one example whose loss is ``<x, w>``, clipped to 1."""
    total, nonfinite = clipped_gradient_sum(
        lambda p, inputs, targets: inputs @ p["w"], at, (x[None], torch.zeros(1)), FlatClipping(clip_norm=1.0)
    )
    return torch.stack(list(total.values())), nonfinite


def test_several_directions_by_hand():
    """Numbers <x, u_k> of a linear loss, clipped as one vector; the step is along the mean of s_k u_k."""
    optimizer, params = zeroth(DPSGD(lr=0.5), directions=3), {"w": torch.zeros(4)}
    state, info = optimizer.init(params), step_info(7)
    at = optimizer.query_point(params, state, info)
    u = torch.stack([direction(0, 3 * 7 + k, 4) for k in range(3)])
    assert first_point(at).keys() == {"along.0", "along.1", "along.2"}
    x = torch.tensor([0.1, -0.2, 0.05, 0.1])
    found, _ = slope_of(x, at)
    torch.testing.assert_close(found, u @ x / max(1, float((u @ x).norm())), rtol=1e-4, atol=1e-5)
    private = {f"along.{k}": torch.tensor(s) for k, s in enumerate((1.0, -2.0, 0.5))}
    moved, _ = optimizer.update(params, private, state, info)
    torch.testing.assert_close(moved["w"], -0.5 * (u[0] - 2 * u[1] + 0.5 * u[2]) / 3)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e8, math.inf])
def test_no_example_adds_more_than_the_clip_norm_along_all_directions_together(size):
    """A bound of each number alone would leave sqrt(5)."""
    optimizer, params = zeroth(directions=5), {"w": torch.zeros(20)}
    at = optimizer.query_point(params, optimizer.init(params), step_info())
    for worst in (*(direction(0, k, 20) for k in range(5)), sum(direction(0, k, 20) for k in range(5))):
        found, nonfinite = slope_of(size * worst, at)
        assert float(found.norm()) <= 1 + 1e-6
        assert float(found.norm()) == pytest.approx(0 if nonfinite else min(1, float(found.norm())))
        assert nonfinite == math.isinf(size)


def test_several_directions_cost_one_event_and_one_noise_each():
    optimizer, params = zeroth(directions=4), {"w": torch.zeros(50)}
    released = []

    class Watched(ZerothOrder):
        def update(self, params, private_gradient, state, info):
            released.append(private_gradient)
            return super().update(params, private_gradient, state, info)

    result = train_locally(
        params,
        lambda indices: (torch.zeros(len(indices), 50), torch.zeros(len(indices))),
        loss_fn=lambda p, x, y: x @ p["w"],
        optimizer=Watched(**vars(optimizer)),
        state=optimizer.init(params),
        sampler=PoissonSampler(num_examples=4, sample_rate=0.5),
        clipping=FlatClipping(clip_norm=1.0),
        mechanism=GaussianMechanism(noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=2),
        local_steps=3,
        streams=Streams(seed=0, client=0, round=1),
    )
    assert result.event == PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=3)
    noise = torch.stack([torch.stack(list(private.values())) for private in released])
    assert noise.shape == (3, 4)
    assert len(noise.unique()) == 12


def test_noise_does_not_follow_from_the_directions():
    """The published code of DPZero seeds its noise with the seed of the direction, which is public."""
    streams = [Streams(seed=0, client=client, round=1) for client in (0, 1)]
    params, optimizer, moved = {"w": torch.zeros(50)}, zeroth(), []
    for stream in streams:
        result = train_locally(
            params,
            lambda indices: (torch.zeros(len(indices), 50), torch.zeros(len(indices))),
            loss_fn=lambda p, x, y: x @ p["w"],
            optimizer=optimizer,
            state=optimizer.init(params),
            sampler=PoissonSampler(num_examples=4, sample_rate=0.5),
            clipping=FlatClipping(clip_norm=1.0),
            mechanism=GaussianMechanism(noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=2),
            local_steps=1,
            streams=stream,
        )
        moved.append(Span(seed=0, first=0, steps=1).numbers(params["w"], result.params["w"]))
    assert not torch.equal(*moved)
    torch.testing.assert_close(result.params["w"], moved[1] * direction(0, 0, 50))


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("make", [norms, Recurrent])
def test_no_graph_is_kept(make, kernels):
    """Outputs that need no gradient have none behind them; a graph would hold the activations of all layers."""
    seen, module = [], make()

    def criterion(outputs, targets):
        seen.append(outputs.requires_grad)
        return functional.cross_entropy(outputs, targets, reduction="none")

    loss, params, optimizer = ModelLoss(module, criterion, kernels=kernels), trainable(module), zeroth(directions=2)
    at = optimizer.query_point(params, optimizer.init(params), step_info())
    batch = torch.randn(6, 4, 5, 5), torch.zeros(6, dtype=torch.long)
    clipped_gradient_sum(loss, at, batch, FlatClipping(clip_norm=1.0))  # also probes what one example repeats
    seen.clear()
    clipped_gradient_sum(loss, at, batch, FlatClipping(clip_norm=1.0))
    assert seen == [False] * 4
    clipped_gradient_sum(loss, params, batch, FlatClipping(clip_norm=1.0))
    assert set(seen[4:]) == {True}


def test_one_moved_model_is_held_at_a_time(monkeypatch):
    """None is left when the next one is made."""
    alive, left, add = weakref.WeakSet(), [], torch.add

    def counted(*args, **kwargs):
        left.append(len(alive))
        return add(*args, **kwargs)

    def loss(p, x, y):
        alive.add(p["w"].untyped_storage())
        return x @ p["w"]

    params, optimizer = {"w": torch.zeros(8)}, zeroth(directions=4)
    at = optimizer.query_point(params, optimizer.init(params), step_info())
    monkeypatch.setattr(torch, "add", counted)
    clipped_gradient_sum(loss, at, (torch.ones(2, 8), torch.zeros(2)), FlatClipping(clip_norm=1.0))
    assert left == [0] * 8


def test_a_model_with_a_pass_per_example_gives_the_same_numbers():
    """A branch on data, which no pass over a batch can take."""

    def branching(p, x, y):
        return (x @ p["w"]) ** 2 if float(x.sum()) > 0 else 3 * (x @ p["w"])

    def plain(p, x, y):
        return torch.where(x.sum(1) > 0, (x @ p["w"]) ** 2, 3 * (x @ p["w"]))

    params, optimizer = {"w": torch.ones(8)}, zeroth(directions=2)
    at = optimizer.query_point(params, optimizer.init(params), step_info())
    batch = torch.randn(5, 8), torch.zeros(5)
    one, other = (clipped_gradient_sum(loss, at, batch, FlatClipping(clip_norm=3.0))[0] for loss in (branching, plain))
    for name, number in one.items():
        torch.testing.assert_close(number, other[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("smoothing", 0), ("smoothing", math.nan), ("steps_per_round", 0), ("directions", 0), ("directions", 1.5)],
)
def test_what_is_out_of_bounds_is_refused(name, value):
    with pytest.raises(SettingError, match=f"^{name}="):
        zeroth(**{name: value})
