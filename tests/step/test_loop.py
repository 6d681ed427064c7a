import math
import random
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.params import flatten, global_norm, subtract, trainable
from fed_dpsat.step import loop
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.draws import kept
from fed_dpsat.step.generators import training_on
from fed_dpsat.step.gradients.per_example import ModelLoss
from fed_dpsat.step.loop import LocalResult, Member, Streams, made_batch, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers.base import climb
from fed_dpsat.step.optimizers.dpsat import DPSAT, DPSATMomentum
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.stacked import Stacked
from fed_dpsat.step.unchecked import unchecked

STREAMS = Streams(seed=1, client=2, round=3)
SGD = DPSGD(lr=0.1, momentum=0.9, weight_decay=0.01)
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2] * 4)


def data(indices):
    return X[indices], Y[indices]


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh(), nn.Linear(4, 3)).double()


def train(
    params, loss_fn, *, sigma=1.0, clip_norm=1.0, rate=0.5, num_examples=12, batches=data, **changes
) -> LocalResult:
    """Ten steps on about six of twelve examples, unless told otherwise."""
    sampler = PoissonSampler(num_examples=num_examples, sample_rate=rate)
    optimizer = changes.pop("optimizer", SGD)
    settings = {
        "loss_fn": loss_fn,
        "optimizer": optimizer,
        "state": optimizer.init(params),
        "sampler": sampler,
        "clipping": FlatClipping(clip_norm=clip_norm),
        "mechanism": GaussianMechanism(
            noise_multiplier=sigma, clip_norm=clip_norm, expected_batch_size=sampler.expected_batch_size
        ),
        "local_steps": 10,
        "streams": STREAMS,
    }
    return train_locally(params, batches, **settings | changes)


@pytest.fixture
def model():
    module = network()
    return trainable(module), ModelLoss(module)


def gradient_free(params, inputs, targets):
    """A loss that no parameter changes: what training does is noise alone."""
    return inputs.sum(1) * 0 * sum(p.sum() for p in params.values())


def test_by_hand(input_gradient):
    """Two steps on both examples: the clipped ones, (0.6, 0.8) and (0.5, 0), sum up to (1.1, 0.8)."""
    examples = torch.tensor([[3.0, 4.0], [0.5, 0.0]])
    result = train(
        {"w": torch.zeros(2)},
        input_gradient,
        sigma=0,
        rate=1,
        num_examples=2,
        batches=lambda i: (examples[i], torch.zeros(len(i))),
        optimizer=DPSGD(lr=1),
        local_steps=2,
    )
    torch.testing.assert_close(result.params["w"], torch.tensor([-1.1, -0.8]))
    assert result.event == PrivacyEvent(noise_multiplier=0, sample_rate=1, steps=2)
    assert result.nonfinite_examples == 0


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0, 0), (0.9, 0), (0.9, 0.1)])
def test_without_noise_and_bound_it_is_the_sgd_of_torch(momentum, weight_decay):
    """On the same Poisson batches, their sums divided by the expected size of 6."""
    module = network()
    ours = train(
        trainable(module),
        ModelLoss(module),
        sigma=0,
        clip_norm=math.inf,
        optimizer=DPSGD(lr=0.1, momentum=momentum, weight_decay=weight_decay),
        local_steps=20,
    )
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    sampler, sizes = PoissonSampler(num_examples=12, sample_rate=0.5), set()
    for indices in sampler.batches(20, STREAMS.generator("sampling")):
        sgd.zero_grad()
        (nn.functional.cross_entropy(module(X[indices]), Y[indices], reduction="sum") / 6).backward()
        sgd.step()
        sizes.add(len(indices))
    assert len(sizes) > 3
    torch.testing.assert_close(ours.params, trainable(module), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [DPSAT, DPSATMomentum])
def test_without_a_radius_it_is_dpsgd_bit_for_bit(method, model, same_bits):
    plain = train(*model, local_steps=50)
    sharp = train(*model, local_steps=50, optimizer=method(base=SGD, rho=0))
    assert same_bits(sharp.params, plain.params)
    assert not same_bits(train(*model, local_steps=50, optimizer=method(base=SGD, rho=0.1)).params, plain.params)


def test_dpsat_step_by_step():
    """Gradients x of the loss x w^2 / 2 are w x: at w = 1 the first is 1; the second is taken at w + 0.25."""

    def quadratic(params, inputs, targets):
        return inputs[:, 0] * params["w"].square().sum() / 2

    result = train(
        {"w": torch.ones(1)},
        quadratic,
        sigma=0,
        clip_norm=math.inf,
        rate=1,
        num_examples=1,
        batches=lambda i: (torch.ones(len(i), 1), torch.zeros(len(i))),
        optimizer=DPSAT(base=DPSGD(lr=0.5), rho=0.25),
        local_steps=2,
    )
    assert result.params["w"].item() == 0.5 - 0.5 * 0.75


@pytest.mark.parametrize("physical", [1, 2, 5])
@pytest.mark.parametrize("optimizer", [SGD, DPSAT(base=SGD, rho=0.03)])
def test_physical_batches_change_nothing(optimizer, physical, model):
    whole = train(*model, optimizer=optimizer)
    parts = train(*model, optimizer=optimizer, physical_batch_size=physical)
    torch.testing.assert_close(parts.params, whole.params, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("physical", [1, 2, 128])
@pytest.mark.parametrize("method", [DPSAT, DPSATMomentum])
def test_without_a_learning_rate_the_weights_stay(method, physical, model, same_bits):
    optimizer = method(base=DPSGD(lr=0, momentum=0.9), rho=0.03)
    result = train(*model, optimizer=optimizer, local_steps=12, physical_batch_size=physical)
    assert same_bits(result.params, model[0])


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD,
        DPSAT(base=SGD, rho=0.1),
        DPSATMomentum(base=SGD, rho=0.1),
        DPSGD(lr=0.1, momentum=0.9, lr_schedule="cosine", total_steps=10),
    ],
)
def test_two_rounds_are_one_twice_as_long_where_state_is_passed_on(optimizer, model, same_bits):
    """Full batches and no noise, so that the rounds' own streams make no difference."""
    params, loss = model
    settings = {"sigma": 0, "rate": 1, "optimizer": optimizer}
    once = train(params, loss, **settings, local_steps=10)
    half = train(params, loss, **settings, local_steps=5)
    twice = train(
        half.params, loss, **settings, local_steps=5, state=half.state, first_step=5, streams=replace(STREAMS, round=4)
    )
    reset = train(half.params, loss, **settings, local_steps=5)
    assert same_bits(twice.params, once.params)
    assert same_bits(flatten(twice.state), flatten(once.state))
    assert not same_bits(reset.params, once.params)


@pytest.mark.parametrize("optimizer", [DPSAT(base=SGD, rho=0.1), SGD, DPSGD(lr=0.1)])
def test_nothing_given_is_changed_in_place(optimizer, model, same_bits):
    first = train(*model, optimizer=optimizer)
    given = flatten({"params": first.params, "state": first.state})
    before = {path: t.clone() for path, t in given.items()}
    train(first.params, model[1], optimizer=optimizer, state=first.state)
    assert same_bits(given, before)


class CallsItself(DPSGD):
    """Its ``update_owned`` is that of DP-SGD, which does not know what it does."""

    def update(self, params, private_gradient, state, info):
        return super().update(params, {name: 2 * g for name, g in private_gradient.items()}, state, info)


@pytest.mark.parametrize("sigma", [0, 1])
def test_an_update_of_ones_own_is_called(sigma, model, same_bits):
    twice = train(*model, sigma=sigma, optimizer=CallsItself(lr=0.125))
    assert same_bits(twice.params, train(*model, sigma=sigma, optimizer=DPSGD(lr=0.25)).params)


@dataclass(frozen=True, kw_only=True)
class Keeps(GaussianMechanism):
    """Keeps the tensors that it released, and what was in them."""

    kept: list = field(default_factory=list)

    def privatize(self, clipped_sum, generator):
        private = super().privatize(clipped_sum, generator)
        self.kept.append((private, {name: g.clone() for name, g in private.items()}))
        return private


@pytest.mark.parametrize(("sigma", "clip_norm"), [(1, 1), (0, 1), (0, math.inf)])
def test_what_a_mechanism_keeps_is_not_written_into(sigma, clip_norm, model, same_bits):
    mechanism = Keeps(noise_multiplier=sigma, clip_norm=clip_norm, expected_batch_size=6)
    with unchecked():
        result = train(*model, sigma=sigma, clip_norm=clip_norm, mechanism=mechanism, optimizer=DPSGD(lr=0.1))
    assert len(mechanism.kept) == 10
    assert all(same_bits(*pair) for pair in mechanism.kept)
    plain = train(*model, sigma=sigma, clip_norm=clip_norm, optimizer=DPSGD(lr=0.1))
    torch.testing.assert_close(result.params, plain.params, rtol=1e-12, atol=1e-12)
    assert same_bits(result.params, plain.params) or not sigma


# What it costs, and the noise that pays for it.

WIDE = {"a": torch.zeros(100, 150), "b": torch.zeros(15_000)}
PLAIN = DPSGD(lr=0.5)


def noise_steps(local_steps, **changes):
    """Changes made to ``WIDE`` by that many rounds of one step on a loss without a gradient."""
    for r in range(local_steps):
        streams = replace(STREAMS, round=r)
        result = train(WIDE, gradient_free, optimizer=PLAIN, local_steps=1, streams=streams, **changes)
        yield from result.params.values()


@pytest.mark.parametrize("rate", [1e-9, 0.5, 1])
def test_a_step_is_noised_whatever_came(rate, looks_gaussian):
    """lr sigma C / (q N), whether the batch was empty, of another size than expected, or all."""
    std = 0.5 * 2 * 0.1 / (rate * 12)
    assert looks_gaussian(noise_steps(4, sigma=2, clip_norm=0.1, rate=rate), std)


@pytest.mark.parametrize("off", [0.9, 1.1])
def test_another_noise_would_be_noticed(off, looks_gaussian):
    assert not looks_gaussian(noise_steps(4, sigma=2 * off, clip_norm=0.1), 0.5 * 2 * 0.1 / 6)


@pytest.mark.parametrize("rate", [1e-9, 0.5])
def test_every_step_of_a_round_has_its_own_noise(rate, looks_gaussian):
    """Ten independent steps add up to sqrt(10) deviations; ten times the same one would to 10."""
    result = train(WIDE, gradient_free, optimizer=PLAIN, rate=rate)
    assert looks_gaussian(result.params.values(), 10**0.5 * 0.5 / (rate * 12))


def test_empty_batches_are_steps(model, same_bits):
    """At a rate of 1e-9 all ten are empty: they are charged and noised."""
    params, loss = model
    sizes = []

    def batches(indices):
        sizes.append(len(indices))
        return data(indices)

    result = train(params, loss, rate=1e-9, batches=batches)
    assert sizes == [0] * 10
    assert result.event == PrivacyEvent(noise_multiplier=1, sample_rate=1e-9, steps=10)
    assert not any((d == 0).any() for d in subtract(result.params, params).values())


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.5, 0.25, 1), (0, 1, 7)])
def test_the_event_is_of_the_sampler_and_the_mechanism_that_ran(model, sigma, rate, steps):
    result = train(*model, sigma=sigma, rate=rate, local_steps=steps)
    assert result.event == PrivacyEvent(noise_multiplier=sigma, sample_rate=rate, steps=steps)


def test_no_steps_make_no_event(model):
    with pytest.raises(ValueError, match="steps=0"):
        train(*model, local_steps=0)


def test_a_mechanism_for_another_bound_is_refused(model):
    """Its noise would be scaled to 1 where examples add up to 10: an event that understates the cost."""
    with pytest.raises(SettingError, match=r"clip_norm=.*1.* is not .*10"):
        train(*model, clip_norm=1.0, clipping=FlatClipping(clip_norm=10.0))


def test_more_rows_than_sampled_examples_are_refused(model):
    """Two views of each example would each be clipped to C: twice the contribution that is charged."""
    with pytest.raises(ValueError, match="24"):
        train(*model, rate=1, batches=lambda i: data(i.repeat(2)))


def test_examples_without_a_finite_gradient_are_counted_and_left_out(model):
    params, loss = model
    rows = X.clone()
    rows[5] = math.nan
    result = train(params, loss, rate=1, batches=lambda i: (rows[i], Y[i]))
    assert result.nonfinite_examples == 10
    assert all(p.isfinite().all() for p in result.params.values())
    others = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])
    mechanism = GaussianMechanism(noise_multiplier=1, clip_norm=1, expected_batch_size=12)
    without = train(params, loss, rate=1, num_examples=11, batches=lambda i: data(others[i]), mechanism=mechanism)
    torch.testing.assert_close(result.params, without.params, rtol=1e-10, atol=1e-12)


# Randomness.


def test_the_same_streams_give_the_same_bits(model, same_bits):
    assert same_bits(train(*model).params, train(*model).params)


def test_another_seed_client_round_or_attempt_has_other_noise():
    """No two share a draw, nor a part of one: their noises are uncorrelated."""
    streams = [
        Streams(seed=0, client=1, round=11),
        Streams(seed=1, client=1, round=11),
        Streams(seed=0, client=11, round=1),
        Streams(seed=0, client=2, round=11),
        Streams(seed=0, client=1, round=12),
        Streams(seed=0, client=1, round=11, attempt=1),
    ]
    noises = [train(WIDE, gradient_free, rate=1, streams=s, local_steps=1).params["b"] for s in streams]
    for a, b in combinations(noises, 2):
        assert not (a == b).any()
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / len(a) ** 0.5


def test_batches_and_noise_have_streams_of_their_own(same_bits):
    """Drawn from one stream, the number of coins would move the noise that follows them."""
    few, many = (train(WIDE, gradient_free, num_examples=n, rate=3 / n, local_steps=2) for n in (6, 12))
    assert same_bits(few.params, many.params)


@pytest.mark.parametrize("purpose", ["sampling", "noise"])
def test_streams_start_where_they_started(purpose):
    assert STREAMS.generator(purpose).random() == STREAMS.generator(purpose).random()
    assert STREAMS.generator(purpose).random() != replace(STREAMS, client=0).generator(purpose).random()
    assert STREAMS.torch_seed() == STREAMS.torch_seed() != replace(STREAMS, attempt=1).torch_seed()


@pytest.mark.parametrize("layers", [(), (nn.Dropout(0.5),)], ids=["plain", "dropout"])
def test_global_generators_are_neither_read_nor_moved(layers, same_bits):
    module = network(*layers)
    params, results = trainable(module), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        results.append(train(params, ModelLoss(module)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
        assert random.getstate() == before[2]
    assert same_bits(results[0].params, results[1].params)


def test_dropout_follows_the_streams(same_bits):
    """Without noise and with all examples, the masks alone tell two rounds apart."""
    module = network(nn.Dropout(0.5))
    settings = {"sigma": 0, "rate": 1}
    first = train(trainable(module), ModelLoss(module), **settings)
    other = train(trainable(module), ModelLoss(module), **settings, streams=replace(STREAMS, round=4))
    assert not same_bits(first.params, other.params)


# What a model draws: example by example, secret where noise is, and the same for a seed in simulations.


class Reaching(nn.Module):
    """Draws from a generator that any code can reach."""

    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, x):
        drawn = {"random": random.random, "numpy": np.random.random_sample}[self.source]()
        return x * drawn if self.training else x


DRAWING = {
    "dropout": lambda: nn.Dropout(0.5),
    "random": lambda: Reaching("random"),
    "numpy": lambda: Reaching("numpy"),
}
EXACT = {"sigma": 0, "clip_norm": 1.0}
"""What two runs differ in is what examples drew."""


def trained(layer, **changes):
    module = network(layer)
    settings = {**EXACT, "rate": 1, "local_steps": 2, **changes}
    return train(trainable(module), ModelLoss(module), **settings).params


@pytest.mark.by_default("dropout", "numpy")
@pytest.mark.parametrize("kind", DRAWING)
def test_a_seed_repeats_what_a_model_draws(kind, same_bits):
    random.seed(1)
    first = trained(DRAWING[kind]())
    random.seed(2)
    np.random.seed(2)
    assert same_bits(trained(DRAWING[kind]()), first)
    for change in ({"seed": 9}, {"client": 9}, {"round": 9}, {"attempt": 9}):
        assert not same_bits(trained(DRAWING[kind](), streams=replace(STREAMS, **change)), first)


@pytest.mark.parametrize("kind", DRAWING)
def test_who_knows_the_seed_does_not_know_what_a_model_draws_under_system(kind, same_bits):
    secret = replace(STREAMS, noise_source="system")
    assert not same_bits(trained(DRAWING[kind](), streams=secret), trained(DRAWING[kind](), streams=secret))


def test_steps_and_examples_draw_each_their_own():
    """The masks of one input number, over 200 steps of a client with 12 examples: coins, and no two alike by more."""
    streams = replace(STREAMS, seed=4)
    masks = torch.stack(
        [
            kept(torch.from_numpy(np.ascontiguousarray(streams.draws(step, torch.arange(12)).words(0, 64))), 0.5)
            for step in range(200)
        ]
    ).double()
    assert float(masks.mean()) == pytest.approx(0.5, abs=0.01)
    flat = 2 * masks.flatten(2).reshape(200 * 12, 64) - 1
    alike = (flat @ flat.T / 64).fill_diagonal_(0)
    assert float(alike.abs().max()) < 0.9
    assert float(alike.mean()) == pytest.approx(0, abs=0.001)


def test_one_example_more_moves_a_step_by_at_most_its_bound():
    """With the other examples' draws where they were: of a client whose last example is there or not, without noise."""
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4)).double()
    params = trainable(module)
    for clip_norm in (0.01, 1.0):
        sums = [
            subtract(
                train(
                    params,
                    ModelLoss(module),
                    sigma=0,
                    clip_norm=clip_norm,
                    rate=1,
                    num_examples=n,
                    local_steps=1,
                    batches=lambda i: (X.repeat(20, 1)[i], Y.repeat(20)[i]),
                    optimizer=DPSGD(lr=n),  # divided by the expected batch size: the sum
                ).params,
                params,
            )
            for n in (200, 201)
        ]
        assert float(global_norm(subtract(*sums))) <= clip_norm * (1 + 1e-9)


@pytest.mark.parametrize("public", [False, True])
def test_an_attacker_who_knows_the_seed_cannot_tell_an_example_apart(public, monkeypatch):
    """One step at sigma 1 on 200 others, the example in front of them; the attacker computes either sum with the masks
    of the run's seed, and guesses by which is nearer. With masks that are public, as they once were, all guesses are
    right; the bound on one example allows half of them and a few more.
    """
    if public:
        monkeypatch.setattr("fed_dpsat.step.loop.SECRET", frozenset({"sampling", "noise"}))
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 5))
    params = trainable(module)
    x, y = torch.randn(201, 20, generator=generator), torch.randint(5, (201,), generator=generator)

    def released(with_it, sigma=0.0, source="seeded"):
        first, count = 1 - with_it, 200 + with_it
        moved = train(
            params,
            ModelLoss(module),
            sigma=sigma,
            rate=1,
            num_examples=count,
            local_steps=1,
            batches=lambda i: (x[i + first], y[i + first]),
            optimizer=DPSGD(lr=count),
            streams=replace(STREAMS, noise_source=source),
        ).params
        return torch.cat([p.flatten() for p in moved.values()])

    without, included = released(0), released(1)
    right = 0
    for trial in range(40):
        seen = released(trial % 2, sigma=1.0, source="system")
        right += int(((seen - included).norm() < (seen - without).norm()) == bool(trial % 2))
    assert (right == 40) if public else (right < 34)


class Augmenting:
    """Batches that are drawn, each time anew."""

    def __init__(self, draw):
        self.draw = draw

    def __call__(self, indices):
        return X[indices] + self.draw(len(indices)), Y[indices]


@pytest.mark.parametrize(
    "draw",
    [lambda n: torch.rand(n, 3, dtype=torch.float64), lambda n: torch.tensor(np.random.rand(n, 3))],
    ids=["torch", "numpy"],
)
def test_what_batches_draw_is_each_examples_own(draw, same_bits):
    drawn = {}
    for indices in (torch.arange(12), torch.tensor([3, 5, 11])):
        with training_on(torch.device("cpu")):
            batch, _ = made_batch(Augmenting(draw), indices, STREAMS.draws(0, indices), torch.device("cpu"))
        drawn[len(indices)] = batch
    assert torch.equal(drawn[12][[3, 5, 11]], drawn[3])
    assert len(set((drawn[12] - X).flatten().tolist())) == 36
    module = network()
    runs = [train(trainable(module), ModelLoss(module), batches=Augmenting(draw)).params for _ in range(2)]
    assert same_bits(*runs)


# Training mode belongs to the loop.


class Said(nn.Module):
    """Says in which mode it is called; what it keeps itself is put back after a pass."""

    def __init__(self, say):
        super().__init__()
        self.say = say

    def forward(self, x):
        self.say(self.training)
        return x


@pytest.mark.parametrize("training", [True, False])
def test_a_module_trains_in_training_mode_whatever_mode_it_comes_in(training, same_bits):
    module = network(nn.Dropout(0.5)).train(training)
    assert same_bits(train(trainable(module), ModelLoss(module), **EXACT).params, trained_in_mode())
    assert {part.training for part in module.modules()} == {training}
    modes = set()
    module = network(Said(modes.add)).eval()
    train(trainable(module), ModelLoss(module))
    assert modes == {True}


def trained_in_mode():
    module = network(nn.Dropout(0.5)).train()
    return train(trainable(module), ModelLoss(module), **EXACT).params


# Who sees what: the privacy argument is that only clipped sums are made of the data, only the mechanism
# sees them, and the optimizer sees what the mechanism lets out.


class RecordingOptimizer:
    """Climbs and descends; keeps everything it was ever given."""

    def __init__(self):
        self.given, self.made = [], []

    def init(self, params):
        return {"last": {name: torch.zeros_like(p) for name, p in params.items()}}

    def query_point(self, params, state, info):
        self.given += [params, *state.values()]
        return self.make(climb(params, state["last"], 0.1))

    def update(self, params, private_gradient, state, info):
        self.given += [params, private_gradient, *state.values()]
        moved = self.make({name: p - private_gradient[name] for name, p in params.items()})
        return moved, {"last": self.make({name: g * 1 for name, g in private_gradient.items()})}

    def make(self, params):
        self.made.append(params)
        return params


class RecordingMechanism:
    """Keeps what went in and what came out."""

    def __init__(self, inner):
        self.inner, self.seen, self.released = inner, [], []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def privatize(self, clipped_sum, generator):
        self.seen.append(clipped_sum)
        self.released.append(self.inner.privatize(clipped_sum, generator))
        return self.released[-1]


def tensors(dicts):
    """Which tensors the dicts hold: the very objects, not their values."""
    return {id(t) for d in dicts for t in d.values()}


@pytest.mark.parametrize("rate", [1e-9, 0.5, 1])
def test_the_optimizer_sees_parameters_private_gradients_and_its_state_alone(model, rate):
    params, loss = model
    optimizer = RecordingOptimizer()
    state = optimizer.init(params)
    mechanism = RecordingMechanism(GaussianMechanism(noise_multiplier=1, clip_norm=1, expected_batch_size=rate * 12))
    with unchecked():
        result = train(params, loss, rate=rate, optimizer=optimizer, state=state, mechanism=mechanism)
    assert len(mechanism.seen) == len(mechanism.released) == 10
    given = tensors(optimizer.given)
    assert given <= tensors([params, *state.values(), *mechanism.released, *optimizer.made])
    assert not given & tensors(mechanism.seen)
    assert tensors(mechanism.released) <= given
    assert tensors([result.params, *result.state.values()]) <= tensors(optimizer.made)


def test_the_gradient_is_taken_at_the_query_point_and_the_step_at_the_parameters(same_bits):
    """The gradient of |w|^2 / 2 is w itself, so the unclipped sum over one example is the point asked at."""

    def squared(params, inputs, targets):
        return inputs[:, 0] * sum(p.square().sum() for p in params.values()) / 2

    optimizer, params = RecordingOptimizer(), {"a": torch.ones(2), "b": torch.ones(1)}
    mechanism = RecordingMechanism(GaussianMechanism(noise_multiplier=0, clip_norm=math.inf, expected_batch_size=1))
    with unchecked():
        train(
            params,
            squared,
            clip_norm=math.inf,
            sigma=0,
            rate=1,
            num_examples=1,
            batches=lambda i: (torch.ones(len(i), 1), torch.zeros(len(i))),
            optimizer=optimizer,
            mechanism=mechanism,
        )
    asked, moved = optimizer.made[0::3], optimizer.made[1::3]
    assert all(same_bits(total, point) for total, point in zip(mechanism.seen, asked, strict=True))
    assert not same_bits(asked[1], moved[0])
    assert [id(p) for p in optimizer.given[2::5]] == [id(p) for p in [params, *moved[:-1]]]


def three(noise_multiplier=1.0):
    sampler = PoissonSampler(num_examples=12, sample_rate=0.5)
    mechanism = GaussianMechanism(noise_multiplier=noise_multiplier, clip_norm=1, expected_batch_size=6)
    return [
        Member(batches=data, state={}, sampler=sampler, mechanism=mechanism, streams=replace(STREAMS, client=client))
        for client in range(3)
    ]


SETTINGS = {"optimizer": DPSGD(lr=0.1), "clipping": FlatClipping(clip_norm=1), "local_steps": 4}


def test_members_train_as_each_does_alone(model, same_bits):
    params, loss = model
    results = loop.train(params, three(), loss_fn=loss, **SETTINGS)
    for member, result in zip(three(), results, strict=True):
        single = train_locally(params, loss_fn=loss, **SETTINGS, **vars(member))
        assert same_bits(result.params, single.params)
        assert result.event == single.event


@pytest.mark.parametrize("executor", [None, Stacked])
def test_a_watch_sees_the_private_gradients_of_each_member_and_changes_no_bit(executor, model, same_bits):
    """Stepping along what it saw gives the parameters, so it saw all of it, and what it keeps is not overwritten."""
    params, loss = model
    seen = {k: [] for k in range(3)}
    how = {"loss_fn": loss, "executor": executor, **SETTINGS}
    results = loop.train(params, three(), watch=lambda k, at, private: seen[k].append(private), **how)
    for k, (result, unseen) in enumerate(zip(results, loop.train(params, three(), **how), strict=True)):
        assert same_bits(result.params, unseen.params)
        assert len(seen[k]) == 4
        replayed = params
        for private in seen[k]:
            replayed = {name: torch.add(p, private[name], alpha=-0.1) for name, p in replayed.items()}
        assert same_bits(replayed, result.params)
