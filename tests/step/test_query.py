"""What a query is, and that training keeps to it: clip after the mask, noise on what is active and nowhere else."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.loop import Member, Streams, train, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.optimizers.base import ASCENT, BASE
from fed_dpsat.step.optimizers.proximal import Proximal
from fed_dpsat.step.query import (
    Composed,
    Query,
    Slope,
    as_query,
    compact,
    first_point,
    map_points,
    simplified,
    spread,
    zero_sum,
)
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.secure_noise import system_generator
from fed_dpsat.step.stacked import Stacked, Unstackable
from fed_dpsat.step.unchecked import unchecked
from fed_dpsat.testing.problems import quadratic, step_info

W = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(5.0)}
MASK = {"a": torch.tensor([[True, False], [False, True]])}
ONE = FlatClipping(clip_norm=1)


def both(names=("a", "b"), value=False):
    return {name: torch.full(W[name].shape, value) for name in names}


def test_compact_and_spread_by_hand(same_bits):
    query = Query(points=((1.0, W),), active=MASK)
    short = compact(query, W)
    assert {name: t.tolist() for name, t in short.items()} == {"a": [1, 4], "b": 5}
    assert {n: t.tolist() for n, t in spread(query, short).items()} == {"a": [[1, 0], [0, 4]], "b": 5}
    assert {name: tuple(t.shape) for name, t in zero_sum(query).items()} == {"a": (2,), "b": ()}
    assert same_bits(spread(W, W), W)


def test_a_name_that_is_not_active_is_an_empty_vector():
    query = Query(points=((1.0, W),), active=both(["a"]))
    assert compact(query, W)["a"].shape == (0,)
    assert spread(query, compact(query, W))["a"].tolist() == [[0, 0], [0, 0]]


def test_a_mask_that_is_true_everywhere_is_none():
    query = Query(points=((1.0, W),), active=both(value=True))
    assert query.active is None
    assert query.plain is W
    assert simplified(query) is W


@pytest.mark.parametrize(
    "more",
    [{"points": ((0.5, W),)}, {"points": ((1.0, W), (1.0, W))}, {"active": MASK}, {"loss": lambda loss: loss}],
)
def test_what_is_more_than_a_point_is_not_plain(more):
    assert Query(**{"points": ((1.0, W),), **more}).plain is None


def test_map_points_keeps_the_rest():
    query = Query(points=((0.25, W), (2.0, W)), active=MASK, loss=lambda loss: loss)
    moved = map_points(query, lambda at: {name: p + 1 for name, p in at.items()})
    assert [weight for weight, _ in moved.points] == [0.25, 2]
    assert all(torch.equal(point["a"], W["a"] + 1) for _, point in moved.points)
    assert moved.active.keys() == MASK.keys()
    assert moved.loss is query.loss
    assert map_points(W, lambda at: {"c": at["b"]}) == {"c": W["b"]}
    assert first_point(as_query(W)) is W


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"points": ()}, "without a point"),
        ({"points": ((math.nan, W),)}, "of weight nan"),
        ({"points": ((1.0, W), (1.0, {"a": W["a"]}))}, "whose first point has"),
        ({"active": {"a": torch.ones(2, 2)}}, "it is bool"),
        ({"active": {"a": torch.ones(2, dtype=torch.bool)}}, "of the shape"),
        ({"active": {"c": torch.ones(2, dtype=torch.bool)}}, "of 'c'"),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Query(**{"points": ((1.0, W),), **wrong})


@dataclass(frozen=True, kw_only=True)
class Asks(DPSGD):
    """SGD that asks for what ``query`` makes of the parameters."""

    query: object

    def query_point(self, params, state, info):
        return self.query(params)


def corner(params):
    return Query(points=((1.0, params),), active={"w": torch.tensor([True, False])})


def of_examples(params, inputs, targets):
    return inputs @ params["w"]


@dataclass(frozen=True, kw_only=True)
class Seeing(GaussianMechanism):
    """Remembers the sums it was given, and what it released."""

    seen: list
    released: list

    def privatize(self, clipped_sum, generator):
        self.seen.append(clipped_sum)
        self.released.append(super().privatize(clipped_sum, generator))
        return self.released[-1]


def trained(query, *, noise=1.0, rows=((3.0, 4.0),), steps=1, clipping=ONE, source="seeded", loss=of_examples):
    rows = torch.tensor(rows)
    sampler = PoissonSampler(num_examples=len(rows), sample_rate=1)
    mechanism = Seeing(
        noise_multiplier=noise, clip_norm=clipping.clip_norm, expected_batch_size=len(rows), seen=[], released=[]
    )
    optimizer = Asks(lr=1, query=query)
    start = {"w": torch.zeros(rows.shape[1])}
    with unchecked():
        result = train_locally(
            start,
            lambda indices: (rows[indices], torch.zeros(len(indices))),
            loss_fn=loss,
            optimizer=optimizer,
            state=optimizer.init(start),
            sampler=sampler,
            clipping=clipping,
            mechanism=mechanism,
            local_steps=steps,
            streams=Streams(seed=0, client=0, round=1, noise_source=source),
        )
    return result, mechanism


def test_the_mask_comes_before_the_clip():
    """Of the example (3, 4) the first coordinate is asked for: clipped at 1 it is 1; masked after clipping, 3 / 5."""
    result, mechanism = trained(corner, noise=0.0)
    assert mechanism.seen[0]["w"].tolist() == [1]
    assert result.params["w"].tolist() == [-1, 0]


@pytest.mark.parametrize("source", ["seeded", "system"])
def test_noise_is_drawn_for_what_is_active_and_for_nothing_else(source):
    """200 steps: the frozen coordinate has no noise, to the bit, and as many draws are made as there are others."""
    result, mechanism = trained(corner, rows=((0.0, 0.0),), steps=200, source=source)
    assert result.params["w"][1].item() == 0
    assert result.params["w"][0].item() != 0
    assert {t["w"].shape for t in mechanism.seen + mechanism.released} == {(1,)}


def test_noise_on_active_coordinates_has_the_declared_size(looks_gaussian):
    """Every other of 60,000 coordinates is active; noise_multiplier 1.5, clip norm 1, two examples."""
    every_other = {"w": torch.arange(60_000) % 2 == 0}
    rows = torch.zeros(2, 60_000).tolist()
    result, mechanism = trained(lambda w: Query(points=((1.0, w),), active=every_other), rows=rows, noise=1.5)
    drawn = [mechanism.released[0]["w"].numpy()]
    assert drawn[0].shape == (30_000,)
    assert looks_gaussian(drawn, 1.5 * 1 / 2)
    assert not looks_gaussian(drawn, 0.9 * 1.5 * 1 / 2)
    assert not result.params["w"][1::2].any()
    assert torch.equal(result.params["w"][::2], -mechanism.released[0]["w"])


def test_a_step_with_nothing_active_is_a_step(same_bits):
    """Nothing is released, and it is charged."""
    nothing = {"w": torch.tensor([False, False])}
    result, _ = trained(lambda params: Query(points=((1.0, params),), active=nothing), steps=3)
    assert result.params["w"].tolist() == [0, 0]
    assert result.event.steps == 3


def test_the_empty_batch_of_a_masked_query_is_noised():
    sampler = PoissonSampler(num_examples=1, sample_rate=1e-9)
    optimizer, start = Asks(lr=1, query=corner), {"w": torch.zeros(2)}
    result = train_locally(
        start,
        lambda indices: (torch.zeros(len(indices), 2), torch.zeros(len(indices))),
        loss_fn=of_examples,
        optimizer=optimizer,
        state=optimizer.init(start),
        sampler=sampler,
        clipping=ONE,
        mechanism=GaussianMechanism(noise_multiplier=1, clip_norm=1, expected_batch_size=1),
        local_steps=1,
        streams=Streams(seed=0, client=0, round=1),
    )
    assert result.params["w"][0].item() != 0
    assert result.params["w"][1].item() == 0


def test_the_grid_takes_empty_vectors():
    mechanism = GaussianMechanism(noise_multiplier=1, clip_norm=1, expected_batch_size=1)
    released = mechanism.privatize({"none": torch.zeros(0), "w": torch.zeros(3)}, system_generator())
    assert [len(t) for t in released.values()] == [0, 3]


def test_one_full_point_gives_the_bits_of_plain_parameters(same_bits):
    rows = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).tolist()
    full = {"w": torch.tensor([True, True])}
    plain, *others = (
        trained(query, rows=rows, steps=5, loss=quadratic)[0].params
        for query in (
            lambda params: params,
            lambda params: Query(points=((1.0, params),)),
            lambda params: Query(points=((1.0, params),), active=full),
        )
    )
    assert all(same_bits(plain, other) for other in others)


def test_dp_sat_climbs_every_point_of_its_base():
    """Along (3, 4) by 5: every point moves by (3, 4), and mask, weights and loss stay."""
    wrap = lambda loss: loss  # noqa: E731
    base = Asks(
        lr=1,
        query=lambda w: Query(
            points=((0.25, w), (0.75, {"w": w["w"] + 10})), active={"w": torch.tensor([True, False])}, loss=wrap
        ),
    )
    optimizer = DPSAT(base=base, rho=5)
    at = optimizer.query_point({"w": torch.zeros(2)}, {BASE: {}, ASCENT: {"w": torch.tensor([3.0, 4.0])}}, step_info())
    assert [(weight, point["w"].tolist()) for weight, point in at.points] == [(0.25, [3, 4]), (0.75, [13, 14])]
    assert at.active["w"].tolist() == [True, False]
    assert at.loss is wrap


def test_a_direction_in_another_space_is_refused_in_words():
    optimizer = DPSAT(base=Asks(lr=1, query=lambda w: Query(points=((1.0, {"t": torch.tensor(0.0)}),))), rho=0.1)
    with pytest.raises(
        SettingError, match=r"rho=0\.1 is not possible around a base whose private gradient is of \['t'\]"
    ):
        optimizer.query_point({"w": torch.zeros(2)}, {BASE: {}, ASCENT: {"w": torch.ones(2)}}, step_info())


def test_the_proximal_term_passes_a_query_through():
    anchor = {"w": torch.zeros(2)}
    optimizer = Proximal(base=Asks(lr=1, query=corner), anchor=anchor, proximal_mu=0.5)
    assert optimizer.query_point(anchor, {}, step_info()).active["w"].tolist() == [True, False]
    with pytest.raises(SettingError, match=r"proximal_mu=0\.5 is not possible around"):
        optimizer.update(anchor, {"t": torch.tensor(1.0)}, optimizer.init(anchor), step_info())


def test_opacus_refuses_in_words():
    loss = ModelLoss(torch.nn.Linear(2, 2))
    params = {name: p.detach() for name, p in loss.module.named_parameters()}
    batch = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(SettingError, match="engine='opacus' is not for an optimizer that asks for more than one plain"):
        clipped_gradient_sum(loss, Query(points=((0.5, params),)), batch, ONE, engine="opacus")
    total, _ = clipped_gradient_sum(loss, Query(points=((1.0, params),)), batch, ONE, engine="opacus")
    assert total.keys() == params.keys()


def stacked(query):
    optimizer, start = Asks(lr=1, query=query), {"w": torch.zeros(2)}
    members = [
        Member(
            batches=lambda indices: (torch.ones(len(indices), 2), torch.zeros(len(indices))),
            state=optimizer.init(start),
            sampler=PoissonSampler(num_examples=1, sample_rate=1),
            mechanism=GaussianMechanism(noise_multiplier=0, clip_norm=1, expected_batch_size=1),
            streams=Streams(seed=0, client=client, round=1),
        )
        for client in range(2)
    ]
    settings = {"optimizer": optimizer, "clipping": ONE, "local_steps": 1, "executor": Stacked}
    return train(start, members, loss_fn=of_examples, **settings)


def test_clients_are_not_stacked_around_a_query():
    with pytest.raises(Unstackable, match="more than one plain gradient"):
        stacked(corner)
    for plain in (lambda params: params, lambda params: Query(points=((1.0, params),))):
        assert np.allclose([result.params["w"] for result in stacked(plain)], -(0.5**0.5))


# Who chooses a point sees no example: code of a class of its own would be called with the batch.


class Spy(torch.Tensor):
    """Keeps what it is computed with."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Spy.seen += [t for t in args if type(t) is torch.Tensor and t.shape[:1] == (5,)]
        return super().__torch_function__(func, types, args, kwargs or {})


class Curious:
    """An optimizer that asks as ``ask`` says, and answers an update as ``answer`` says."""

    def __init__(self, ask=lambda p: p, answer=lambda p: p):
        self.ask, self.answer = ask, answer

    def init(self, params):
        return {}

    def query_point(self, params, state, info):
        return self.ask(params)

    def update(self, params, private_gradient, state, info):
        return self.answer(params), {}


def spies(params):
    return {name: p.as_subclass(Spy) for name, p in params.items()}


class Number:
    """Is multiplied with what is private."""

    def __float__(self):
        return 1.0

    def __rmul__(self, other):
        Spy.seen.append(other)
        return other

    __rtruediv__ = __rmul__


class Sloped(Slope):
    """A slope whose width is of its own class."""

    width = property(lambda self: Number(), lambda self, value: None)

    def __post_init__(self):
        pass


def sloped(kind=Slope, weight=1.0):
    def ask(params):
        points = lambda: [(weight, params), (-1.0, params)]  # noqa: E731
        return Query(points=((1.0, {"s": torch.tensor(0.0)}),), slopes={"s": kind(points=points, width=1.0)})

    return ask


def keeps(loss):
    def kept(params, inputs, targets):
        Spy.seen.append(inputs)
        return loss(params, inputs, targets)

    return kept


class Dict(dict):
    pass


class Asked(Query):
    pass


STRANGE = {
    "points": Curious(spies),
    "parameters after an update": Curious(answer=spies),
    "a dict of its own class": Curious(Dict),
    "a query of its own class": Curious(lambda p: Asked(points=((1.0, p),))),
    "points of a query": Curious(lambda p: Query(points=((0.5, p), (0.5, spies(p))))),
    "a mask": Curious(lambda p: Query(points=((1.0, p),), active=spies({"w": torch.tensor([True, False, True])}))),
    "a slope": Curious(lambda p: sloped()(spies(p))),
    "a slope of its own class": Curious(sloped(Sloped)),
    "the weight of a slope": Curious(sloped(weight=Number())),
    "a weight": Curious(lambda p: Query(points=((Number(), p), (1.0, p)))),
    "a loss": Curious(lambda p: Query(points=((1.0, p),), loss=keeps)),
    "a loss around one that is known": Curious(lambda p: Query(points=((1.0, p),), loss=Composed(keeps, keeps))),
}


@pytest.mark.parametrize("executor", [None, Stacked])
@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("case", STRANGE)
def test_no_class_of_an_optimizers_own_meets_an_example(case, engine, executor):
    Spy.seen.clear()
    x, sampler = torch.randn(5, 3), PoissonSampler(num_examples=5, sample_rate=1.0)
    member = Member(
        batches=lambda i: (x[i], torch.zeros(len(i))),
        state={},
        sampler=sampler,
        mechanism=GaussianMechanism(noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=5.0),
        streams=Streams(seed=0, client=0, round=1),
    )
    known = "plain tensors|real number|of the class Slope|wrapped loss is known|more than one plain gradient"
    refused = pytest.raises((SettingError, Unstackable, TypeError), match=known)
    made_plain = case == "the weight of a slope" or (executor and case == "parameters after an update")
    with suppress(Unstackable) if made_plain else refused:
        train(
            {"w": torch.zeros(3)},
            [member],
            loss_fn=lambda params, inputs, targets: inputs @ params["w"],
            optimizer=STRANGE[case],
            clipping=ONE,
            local_steps=2,
            engine=engine,
            executor=executor,
        )
    assert Spy.seen == []
