"""Clients trained together: as alone to 1e-5, each bounded by itself, and none in another's result."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpsat.errors import SettingError
from fed_dpsat.models.cnn import tanh_cnn_small
from fed_dpsat.models.linear import linear
from fed_dpsat.models.mlp import mlp
from fed_dpsat.params import flatten, global_norm, trainable
from fed_dpsat.step.clipping import AdaptiveClipping, FlatClipping
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.clipping.global_ import GlobalClipping
from fed_dpsat.step.clipping.per_layer import PerLayerClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.loop import Member, Streams, train
from fed_dpsat.step.mechanism import GaussianMechanism, LaplaceMechanism
from fed_dpsat.step.noise import derive_generator
from fed_dpsat.step.optimizers import DPSAT, DPSGD, DPSATMomentum
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.stacked import Stacked, Unstackable, stacked_sum
from fed_dpsat.step.unchecked import unchecked

SHAPE, CLASSES, STEPS = (1, 8, 8), 4, 4
SIZES = (12, 5, 1, 30)
"""At a rate of 0.3 the third client's batches are empty more often than not."""

SGD = DPSGD(lr=0.5, momentum=0.9, weight_decay=1e-3, lr_schedule="cosine", total_steps=3 * STEPS)
OPTIMIZERS = {"dp-sgd": SGD, "dp-sat": DPSAT(base=SGD, rho=0.3), "dp-sat-momentum": DPSATMomentum(base=SGD, rho=0.3)}
MODELS = {
    "linear": lambda: linear(SHAPE, CLASSES),
    "mlp": lambda: mlp(SHAPE, CLASSES, hidden=16),
    "cnn": lambda: tanh_cnn_small(SHAPE, CLASSES, (8, 16)),
    "affine": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(72, CLASSES)
    ),
}


def loss_of(name):
    torch.manual_seed(0)
    return ModelLoss(MODELS[name]())


def examples(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(n, *SHAPE, generator=generator) for n in sizes]
    targets = [torch.randint(CLASSES, (n,), generator=generator) for n in sizes]
    return list(zip(inputs, targets, strict=True))


def members(data, states, *, round=1, sigma=1.0, rate=0.3, clip_norm=1.0):
    made = []
    for client, ((x, y), state) in enumerate(zip(data, states, strict=True)):
        sampler = PoissonSampler(num_examples=len(x), sample_rate=rate)
        mechanism = GaussianMechanism(
            noise_multiplier=sigma, clip_norm=clip_norm, expected_batch_size=sampler.expected_batch_size
        )
        made.append(
            Member(
                batches=lambda i, x=x, y=y: (x[i], y[i]),
                state=state,
                first_step=(round - 1) * STEPS,
                sampler=sampler,
                mechanism=mechanism,
                streams=Streams(seed=0, client=client, round=round),
            )
        )
    return made


def alone(params, made, *, loss_fn, optimizer, clipping, local_steps=STEPS, **settings):
    return train(
        params, made, loss_fn=loss_fn, optimizer=optimizer, clipping=clipping, local_steps=local_steps, **settings
    )


def together(params, made, *, loss_fn, optimizer, clipping, local_steps=STEPS, **settings):
    return train(
        params,
        made,
        loss_fn=loss_fn,
        optimizer=optimizer,
        clipping=clipping,
        local_steps=local_steps,
        executor=Stacked,
        **settings,
    )


def assert_same(stacked, single):
    """Parameters, and each slot of state, within 1e-5 of their norm; everything else equal."""
    for a, b in zip(stacked, single, strict=True):
        assert (a.event, a.nonfinite_examples) == (b.event, b.nonfinite_examples)
        for one, other in ((a.params, b.params), (flatten(a.state), flatten(b.state))):
            assert list(one) == list(other)
            assert [(t.shape, t.dtype) for t in one.values()] == [(t.shape, t.dtype) for t in other.values()]
            away = global_norm({n: (one[n] - t).double() for n, t in other.items()})
            assert away <= 1e-5 * global_norm({n: t.double() for n, t in other.items()})


def rounds(train, data, name, optimizer, clipping, count=3, **settings):
    """The last results of ``count`` rounds of clients that carry their states and start from the mean."""
    loss = loss_of(name)
    params, states = trainable(loss.module), [optimizer.init(trainable(loss.module))] * len(data)
    for round in range(1, count + 1):
        made = members(data, states, round=round, clip_norm=clipping.clip_norm, **settings)
        results = train(params, made, loss_fn=loss, optimizer=optimizer, clipping=clipping)
        params = {n: torch.stack([r.params[n] for r in results]).mean(0) for n in params}
        states = [r.state for r in results]
    return results


@pytest.mark.by_default("dp-sgd-cnn-0.0", "dp-sat-mlp-*", "dp-sat-momentum-affine-0.0", "dp-sgd-linear-0.0")
@pytest.mark.parametrize(
    ("model", "sigma"),
    [
        *((model, 0.0) for model in MODELS),
        ("mlp", 1.0),
        *(pytest.param(model, 1.0, marks=pytest.mark.slow) for model in MODELS if model != "mlp"),
    ],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_together_is_as_alone(model, optimizer, sigma):
    """Three rounds with carried states; unequal sizes, batches that are empty.

    Noise is drawn for parameters, whatever the layers; without it the gradients are seen to more digits.
    """
    arguments = examples(), model, OPTIMIZERS[optimizer], FlatClipping(clip_norm=1.0)
    assert_same(rounds(together, *arguments, sigma=sigma), rounds(alone, *arguments, sigma=sigma))


@pytest.mark.by_default("FlatClipping-inf", "FlatClipping-0.01", "PerLayerClipping-1.0")
@pytest.mark.parametrize(
    "clipping",
    [
        FlatClipping(clip_norm=math.inf),
        FlatClipping(clip_norm=0.01),
        AutomaticClipping(clip_norm=1.0),
        GlobalClipping(clip_norm=1.0, global_threshold=2.0),
        PerLayerClipping(clip_norm=1.0),
    ],
    ids=lambda rule: f"{type(rule).__name__}-{rule.clip_norm}",
)
def test_every_rule_that_looks_at_one_example_is_stacked(clipping):
    arguments = examples(), "mlp", OPTIMIZERS["dp-sat"], clipping
    assert_same(rounds(together, *arguments, sigma=0.0), rounds(alone, *arguments, sigma=0.0))


@pytest.mark.by_default("9", "128")
@pytest.mark.parametrize("physical", [1, pytest.param(4, marks=pytest.mark.slow), 9, 128])
def test_the_split_into_physical_batches_changes_nothing(physical):
    loss, data = loss_of("cnn"), examples()
    params = trainable(loss.module)
    made = members(data, [SGD.init(params)] * len(data), rate=1.0)
    settings = {"loss_fn": loss, "optimizer": SGD, "clipping": FlatClipping(clip_norm=1.0)}
    assert_same(together(params, made, physical_batch_size=physical, **settings), alone(params, made, **settings))


def test_all_batches_empty():
    loss, data = loss_of("linear"), examples()
    params = trainable(loss.module)
    made = members(data, [SGD.init(params)] * len(data), rate=1e-9)
    settings = {"loss_fn": loss, "optimizer": SGD, "clipping": FlatClipping(clip_norm=1.0)}
    assert_same(together(params, made, **settings), alone(params, made, **settings))


def with_bad_rows(data, client, rows):
    inputs, targets = data[client]
    inputs = inputs.clone()
    for row, value in rows.items():
        inputs[row] = value
    return [*data[:client], (inputs, targets), *data[client + 1 :]]


def test_examples_without_a_finite_gradient_are_dropped_and_counted_for_their_client():
    data = with_bad_rows(examples(), 0, {2: math.nan, 5: math.inf})
    arguments = data, "cnn", OPTIMIZERS["dp-sat"], FlatClipping(clip_norm=1.0)
    results = rounds(together, *arguments, rate=1.0)
    assert [r.nonfinite_examples for r in results] == [2 * STEPS, 0, 0, 0]
    assert_same(results, rounds(alone, *arguments, rate=1.0))


def test_a_loss_that_is_nan_for_padding_adds_nothing():
    """0 / 0 for an example of zeros, which no client has."""

    def undefined_at_zero(params, inputs, targets):
        x = inputs.flatten(1)
        return (x / x.norm(dim=1, keepdim=True)) @ params["w"]

    params, data = {"w": torch.randn(64)}, examples()
    made = members(data, [SGD.init(params)] * len(data), rate=0.5)
    settings = {"loss_fn": undefined_at_zero, "optimizer": SGD, "clipping": FlatClipping(clip_norm=0.5)}
    made = [dataclasses.replace(m, mechanism=dataclasses.replace(m.mechanism, clip_norm=0.5)) for m in made]
    results = together(params, made, **settings)
    assert [r.nonfinite_examples for r in results] == [0] * len(data)
    assert_same(results, alone(params, made, **settings))


# Privacy: what one example adds is bounded for its client, and reaches no other.


def prescribed(params, inputs, targets):
    """The gradient of an example is the example."""
    return inputs @ torch.cat([p.flatten() for p in params.values()])


@pytest.mark.parametrize("rule", [FlatClipping, AutomaticClipping, GlobalClipping, PerLayerClipping])
def test_the_sum_of_each_client_is_bounded_example_by_example(rule):
    """Norms from 1e-30 to 1e30, beside each other and beside NaN: one example moves its client's sum by C at most."""
    clip_norm, clients, size = 0.7, 3, 6
    params = {"a.w": torch.zeros(clients, 3, 2), "b.w": torch.zeros(clients, 4)}
    directions = torch.from_numpy(derive_generator(0, purpose="model").standard_normal((clients, size, 10)))
    norms = torch.tensor([[1e-30, 1.0, 1e30, 0.7000001, 1e4, 0.0]] * clients).double()
    rows = (directions / directions.norm(dim=2, keepdim=True) * norms[..., None]).float()
    rows[1, 3] = math.nan
    real = torch.tensor([[True] * 6, [True] * 6, [True, True, True, False, False, False]])
    clipping = rule(clip_norm=clip_norm)

    def sums(present):
        return stacked_sum(prescribed, params, rows, torch.zeros(clients, size), present, clipping)[0]

    everything = sums(real)
    for i in range(size):
        without = real.clone()
        without[:, i] = False
        moved = {n: t.double() - sums(without)[n].double() for n, t in everything.items()}
        for k in range(clients):
            assert float(global_norm({n: t[k] for n, t in moved.items()})) <= clip_norm * (1 + 1e-6)


@pytest.mark.by_default("mlp-*", "cnn-values-0.0")
@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("change", ["values", "huge", "nan", "more"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_no_client_is_in_the_result_of_another(model, change, sigma, same_bits):
    """All of one client's examples are changed: whoever else is in the stack has the same bits.

    With more examples the padding is longer, and sums may be added up in another order: 1e-6.
    """
    data = examples()
    inputs, targets = data[1]
    other = {
        "values": (-3 * inputs + 1, targets.flip(0)),
        "huge": (inputs * 1e18, targets),
        "nan": (inputs * math.nan, targets),
        "more": tuple(torch.cat([t] * 20) for t in (inputs, targets)),
    }[change]
    loss, optimizer = loss_of(model), OPTIMIZERS["dp-sat"]
    params = trainable(loss.module)

    def results(data):
        made = members(data, [optimizer.init(params)] * len(data), sigma=sigma, rate=0.7)
        return together(params, made, loss_fn=loss, optimizer=optimizer, clipping=FlatClipping(clip_norm=1.0))

    before, after = results(data), results([data[0], other, *data[2:]])
    assert not same_bits(before[1].params, after[1].params)
    for k in (0, 2, 3):
        assert before[k].nonfinite_examples == after[k].nonfinite_examples == 0
        if change != "more":
            assert same_bits(before[k].params, after[k].params)
            assert same_bits(flatten(before[k].state), flatten(after[k].state))
        for name, p in before[k].params.items():
            torch.testing.assert_close(after[k].params[name], p, rtol=1e-6, atol=1e-6 * float(p.norm()))


def test_a_client_has_its_own_coins_and_noise_wherever_it_stands(same_bits):
    """Coins and noise are those of the client's streams, not of its place in the stack."""
    params, drawn = {"w": torch.zeros(500)}, []

    def nothing(params, inputs, targets):
        return 0 * params["w"].sum() + 0 * inputs.flatten(1).sum(1)

    data = examples((40, 40, 40))
    made = members(data, [SGD.init(params)] * 3, rate=0.5)
    watched = [dataclasses.replace(m, batches=lambda i, m=m: drawn.append(i.tolist()) or m.batches(i)) for m in made]
    settings = {"loss_fn": nothing, "optimizer": SGD, "clipping": FlatClipping(clip_norm=1.0)}
    forward, first = together(params, watched, **settings), drawn[:]
    drawn.clear()
    backward = together(params, watched[::-1], **settings)
    assert [first[k::3] for k in range(3)] == [drawn[k::3] for k in range(3)][::-1]
    assert all(same_bits(a.params, b.params) for a, b in zip(forward, backward[::-1], strict=True))
    assert not (forward[0].params["w"] == forward[1].params["w"]).any()
    single = alone(params, watched, **settings)
    assert all(same_bits(a.params, b.params) for a, b in zip(forward, single, strict=True))


# What cannot be stacked says so, or is done client by client.


class Reading:
    """Reads a number off the parameters, draws from torch's generator, and counts steps: nothing to map over."""

    def init(self, params):
        return {"count": {"steps": torch.tensor(0)}}

    def query_point(self, params, state, info):
        return {n: p + 0.01 * torch.randn(p.shape) for n, p in params.items()}

    def update(self, params, private_gradient, state, info):
        lr = 0.1 / (1 + float(global_norm(params))) / (1 + int(state["count"]["steps"]))
        moved = {n: p - lr * private_gradient[n] for n, p in params.items()}
        return moved, {**state, "count": {"steps": state["count"]["steps"] + 1}}


def test_an_optimizer_that_cannot_be_mapped_is_called_client_by_client():
    arguments = examples(), "mlp", Reading(), FlatClipping(clip_norm=1.0)
    assert_same(rounds(together, *arguments), rounds(alone, *arguments))


class Writing:
    """Writes into its state and reads a number afterwards: the first is done when ``vmap`` refuses the second."""

    def init(self, params):
        return {"last": {n: torch.zeros_like(p) for n, p in params.items()}}

    def query_point(self, params, state, info):
        return params

    def update(self, params, private_gradient, state, info):
        for name, gradient in private_gradient.items():
            state["last"][name].mul_(0.5).add_(gradient)
        lr = 0.1 / (1 + float(global_norm(state["last"])))
        return {n: p - lr * state["last"][n] for n, p in params.items()}, state


def test_half_a_step_is_not_done_again():
    untrainable("writes into what it is given", optimizer=Writing(), state=Writing().init)


def test_global_generators_are_neither_read_nor_moved(same_bits):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1]
        loss = loss_of("mlp")
        torch.set_rng_state(before[0])
        params = trainable(loss.module)
        made = members(examples(), [Reading().init(params)] * len(SIZES))
        results.append(together(params, made, loss_fn=loss, optimizer=Reading(), clipping=FlatClipping(clip_norm=1.0)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
    assert all(same_bits(a.params, b.params) for a, b in zip(*results, strict=True))


class Counting:
    """A rule that reads a number off the norms."""

    clip_norm = 1.0

    def factors(self, squared_norms):
        scale = 0.5 if float(next(iter(squared_norms.values())).sum()) > 0 else 1.0
        return {n: scale / (1 + s.sqrt()) for n, s in squared_norms.items()}


def untrainable(reason, **changes):
    loss = changes.pop("loss_fn", None) or loss_of("mlp")
    params = trainable(loss.module)
    state = changes.pop("state", SGD.init)(params)
    made = changes.pop("members", None) or members(examples(), [state] * len(SIZES))
    settings = {"loss_fn": loss, "optimizer": SGD, "clipping": FlatClipping(clip_norm=1.0), **changes}
    with pytest.raises(Unstackable, match=reason):
        together(params, made, **settings)


def test_dropout_is_refused():
    layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, CLASSES))
    untrainable("the loss, which vmap refuses", loss_fn=ModelLoss(layers))


@pytest.mark.parametrize("draw", [random.random, np.random.random_sample], ids=["random", "numpy"])
def test_a_model_that_draws_elsewhere_is_refused(draw):
    class Drawing(nn.Flatten):
        def forward(self, x):
            return super().forward(x) * draw()

    untrainable("the loss, which draws", loss_fn=ModelLoss(nn.Sequential(Drawing(), nn.Linear(64, CLASSES))))


@pytest.mark.parametrize("draw", [random.random, np.random.random_sample, lambda: torch.rand(1)])
def test_batches_that_draw_are_refused(draw):
    own = [
        dataclasses.replace(member, batches=lambda i, given=member.batches: (given(i)[0] * draw(), given(i)[1]))
        for member in members(examples(), [SGD.init(trainable(loss_of("mlp").module))] * len(SIZES))
    ]
    untrainable("batches that draw", members=own)


def test_a_rule_that_reads_numbers_is_refused_where_clients_are_asked_together():
    with unchecked():
        untrainable("the clipping rule, which vmap refuses", clipping=Counting())


def test_a_rule_that_reads_numbers_is_asked_example_by_example():
    arguments = examples(), "mlp", OPTIMIZERS["dp-sgd"], Counting()
    assert_same(rounds(together, *arguments, count=1), rounds(alone, *arguments, count=1))


def test_adaptive_clipping_is_refused():
    untrainable("adaptive clipping", clipping=AdaptiveClipping(clip_norm=1.0))


def test_states_of_different_forms_are_refused():
    params = trainable(loss_of("mlp").module)
    state = SGD.init(params)
    later = members(examples()[3:], [state], round=2)
    untrainable("different forms", members=[*members(examples()[:3], [state] * 3), *later])
    untrainable("different forms", members=members(examples(), [state] * 3 + [{**state, "ascent": params}]))


class LawlessL1:
    """A rule of one's own with a bound of the L2 norm."""

    clip_norm = 1.0

    def factors(self, squared_norms):
        total = torch.stack(list(squared_norms.values())).sum(0)
        return dict.fromkeys(squared_norms, 1 / total.sqrt().clamp(min=1))


def test_mechanisms_of_two_norms_are_refused():
    """The bound of one is held for all: noise for the L1 norm would be added to sums that keep the L2 norm alone."""
    made = members(examples(), [SGD.init(trainable(loss_of("mlp").module))] * len(SIZES))
    made[1] = dataclasses.replace(made[1], mechanism=LaplaceMechanism(**vars(made[1].mechanism)))
    untrainable("mechanisms of different bounds", members=made, clipping=LawlessL1())


def test_examples_of_different_shapes_are_refused():
    """In one batch the shape of an example would follow from others, also those of other clients."""
    made = members(examples(), [SGD.init(trainable(loss_of("mlp").module))] * len(SIZES), rate=1.0)
    halves = [dataclasses.replace(one, groups=lambda i: torch.arange(len(i)).tensor_split(2)) for one in made]
    untrainable("examples of different shapes", members=halves)


def test_a_mechanism_for_another_bound_is_refused():
    loss = loss_of("mlp")
    params = trainable(loss.module)
    made = members(examples(), [SGD.init(params)] * len(SIZES))
    made[2] = dataclasses.replace(made[2], mechanism=dataclasses.replace(made[2].mechanism, clip_norm=0.5))
    with pytest.raises(SettingError, match="clip_norm"):
        together(params, made, loss_fn=loss, optimizer=SGD, clipping=FlatClipping(clip_norm=1.0))


def test_more_rows_than_sampled_examples_are_refused():
    loss, data = loss_of("mlp"), examples()
    params = trainable(loss.module)
    made = members(data, [SGD.init(params)] * len(data), rate=1.0)
    twice = made[0].batches
    made[0] = dataclasses.replace(made[0], batches=lambda i: twice(i.repeat(2)))
    with pytest.raises(SettingError, match="24"):
        together(params, made, loss_fn=loss, optimizer=SGD, clipping=FlatClipping(clip_norm=1.0))


def test_sums_are_those_of_one_client_after_the_other():
    """Different parameters for each client, at once."""
    loss, data = loss_of("affine"), examples((7, 7, 7))
    one = trainable(loss.module)
    generator = torch.Generator().manual_seed(1)
    params = {n: p + 0.1 * torch.randn(3, *p.shape, generator=generator) for n, p in one.items()}
    inputs, targets = (torch.stack([d[i] for d in data]) for i in (0, 1))
    clipping = FlatClipping(clip_norm=0.3)
    sums, _ = stacked_sum(loss, params, inputs, targets, torch.ones(3, 7, dtype=torch.bool), clipping)
    for k in range(3):
        expected, _ = clipped_gradient_sum(loss, {n: p[k] for n, p in params.items()}, data[k], clipping)
        for name, t in expected.items():
            torch.testing.assert_close(sums[name][k], t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_our_optimizers_are_mapped(optimizer, monkeypatch):
    """One call a step for all clients together; client by client it would be four."""
    kind, calls = type(OPTIMIZERS[optimizer]), []
    update = kind.update
    monkeypatch.setattr(kind, "update", lambda self, *a: calls.append(self) or update(self, *a))
    rounds(together, examples(), "linear", OPTIMIZERS[optimizer], FlatClipping(clip_norm=1.0), count=1)
    assert len(calls) == STEPS


@pytest.mark.parametrize("word", [-1, 5])
def test_a_word_beyond_the_vocabulary_is_not_that_of_the_next_client(word):
    """Under ``vmap`` torch takes it from the table of a neighbour, and leaves its gradient there."""
    loss = ModelLoss(nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, CLASSES)))
    params = {name: p.expand(3, *p.shape) for name, p in trainable(loss.module).items()}
    inputs = torch.tensor([[[0, 1]], [[2, word]], [[3, 4]]])
    targets, real = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.bool)
    with pytest.raises(Unstackable, match="index out of range"):
        stacked_sum(loss, params, inputs, targets, real, FlatClipping(clip_norm=1.0))
    inputs[1, 0, 1] = 4
    sums, _ = stacked_sum(loss, params, inputs, targets, real, FlatClipping(clip_norm=1.0))
    assert (sums["0.weight"][1].norm(dim=1) > 0).tolist() == [False, False, True, False, True]
