"""Random freeze against the paper, by hand and over 50 steps; its limits, its masks and what composes with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.optimizers.base import BASE, subspace_of
from fed_dpsat.step.optimizers.disk import DiSK
from fed_dpsat.step.optimizers.proximal import Proximal
from fed_dpsat.step.optimizers.random_freeze import RandomFreeze
from fed_dpsat.step.optimizers.zeroth_order import ZerothOrder
from fed_dpsat.step.query import Query, spread
from fed_dpsat.step.subspace import Coordinates
from fed_dpsat.testing.problems import step_info

W = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}


def freeze(base=None, **settings):
    settings = {"seed": 0, "steps_per_round": 5, "total_steps": 50, "freeze_ramp": 0.5, **settings}
    return RandomFreeze(base=base or DPSGD(lr=0.3), **settings)


def test_by_hand():
    """One of two coordinates is frozen: it keeps its bits, though momentum and decay would move it."""
    optimizer = freeze(DPSGD(lr=0.25, momentum=0.5, weight_decay=1), freeze_rate=0.5, freeze_ramp=0)
    state = optimizer.init(W)
    at = optimizer.query_point(W, state, step_info())
    frozen = [name for name, mask in at.active.items() if not mask.all()]
    assert len(frozen) == 1
    (other,) = W.keys() - set(frozen)
    private = spread(at, {other: torch.tensor([4.0]), frozen[0]: torch.zeros(0)})
    params, _ = optimizer.update(W, private, state, step_info())
    assert params[frozen[0]].item() == W[frozen[0]].item()
    assert params[other].item() == W[other].item() - 0.25 * (4 + W[other].item())


def test_the_rate_ramps_linearly_by_hand():
    """10 rounds, of which the first half ramps to 0.8: 0, 0.16, 0.32, 0.48, 0.64, then 0.8."""
    optimizer = freeze(freeze_rate=0.8)
    rates = [optimizer.rate(round) for round in range(1, 11)]
    assert rates == pytest.approx([0, 0.16, 0.32, 0.48, 0.64] + 5 * [0.8])
    assert [freeze(freeze_rate=0.8, freeze_ramp=0).rate(round) for round in (1, 9)] == [0.8, 0.8]


def test_fifty_steps_of_the_paper(problem):
    """A new mask every 5 steps; gradients are masked before the clip, and noise is on active coordinates."""
    optimizer = freeze(DPSGD(lr=problem.lr), freeze_rate=0.75)
    w, before, wrong_by = problem.start, problem.start, 0.0
    for step, ours in enumerate(problem.walk(optimizer)):
        round = step // 5 + 1
        frozen = int(0.75 * min(1, (round - 1) / 5) * 12)
        active = Coordinates(seed=0, round=round, frozen=frozen).active(12).numpy().reshape(3, 4)
        assert active.sum() == 12 - frozen
        private = problem.private(step, lambda x, y, w=w, on=active: problem.gradient(w, x, y) * on, active)
        late = sum(problem.clipped(problem.gradient(w, x, y)) * active for x, y in problem.examples(step))
        wrong_by = max(wrong_by, float(np.abs(private - (late + problem.noise[step] * active) / 6).max()))
        np.testing.assert_array_equal(ours[~active], before[~active])
        w = w - problem.lr * private
        np.testing.assert_allclose(ours, w, rtol=1e-9, atol=1e-11)
        before = ours
    assert wrong_by > 1e-3


def test_without_a_rate_it_is_its_base(problem):
    base = DPSGD(lr=0.3, momentum=0.9, weight_decay=0.01)
    for ours, theirs in zip(problem.walk(freeze(base, freeze_rate=0)), problem.walk(base), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_mask_is_a_function_of_seed_and_round():
    """All steps of a round, every client and the server see the same one; the next round has another."""
    optimizer = freeze(freeze_rate=0.5, freeze_ramp=0)
    params = {"w": torch.zeros(40)}

    def mask(step, optimizer=optimizer):
        return optimizer.query_point(params, {BASE: {}}, step_info(step, round=step // 5 + 1)).active["w"]

    assert all(torch.equal(mask(step), mask(0)) for step in range(5))
    assert torch.equal(mask(0), optimizer.subspace(1, 40).active(40))
    assert torch.equal(mask(5), optimizer.subspace(2, 40).active(40))
    assert not torch.equal(mask(5), mask(0))
    assert not torch.equal(mask(0, freeze(freeze_rate=0.5, freeze_ramp=0, seed=1)), mask(0))


def test_dp_sat_over_it_climbs_in_whole_and_asks_what_is_active():
    optimizer = DPSAT(base=freeze(freeze_rate=0.5, freeze_ramp=0), rho=0.1)
    params = {"w": torch.zeros(4)}
    state = optimizer.init(params)
    _, state = optimizer.update(params, {"w": torch.ones(4)}, state, step_info())
    at = optimizer.query_point(params, state, step_info())
    assert at.points[0][1]["w"].tolist() == pytest.approx([0.05] * 4)
    assert int(at.active["w"].sum()) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda base: DPSAT(base=freeze(base, freeze_rate=0.5, freeze_ramp=0), rho=0.1),
        lambda base: DiSK(base=freeze(base, freeze_rate=0.5, freeze_ramp=0)),
        lambda base: freeze(DiSK(base=base), freeze_rate=0.5, freeze_ramp=0),
        lambda base: freeze(DPSAT(base=base, rho=0.1), freeze_rate=0.5, freeze_ramp=0),
    ],
)
def test_whatever_it_is_composed_with_what_is_frozen_stays(problem, make):
    """To the bit, in every one of 50 steps; and the chain says so."""
    optimizer, before = make(DPSGD(lr=0.3, momentum=0.9, weight_decay=0.1)), problem.start
    for step, w in enumerate(problem.walk(optimizer)):
        active = subspace_of(optimizer, step // 5 + 1, 12).active(12).numpy().reshape(3, 4)
        assert np.array_equal(w[~active], before[~active])
        assert not np.array_equal(w[active], before[active])
        before = w


def test_the_proximal_term_does_not_move_what_is_frozen():
    base = freeze(freeze_rate=0.5, freeze_ramp=0)
    params = {"w": torch.zeros(4)}
    optimizer = Proximal(base=base, anchor={"w": torch.ones(4)}, proximal_mu=1.0)
    moved, _ = optimizer.update(params, {"w": torch.zeros(4)}, optimizer.init(params), step_info())
    active = base.subspace(1, 4).active(4)
    assert torch.equal(moved["w"] != 0, active)
    assert subspace_of(optimizer, 1, 4) == base.subspace(1, 4)


def test_masks_of_the_base_are_kept():
    one = {"w": torch.tensor([True, True, False, False])}

    class Half(DPSGD):
        def query_point(self, params, state, info):
            return Query(points=((1.0, params),), active=one)

    optimizer = freeze(Half(lr=1), freeze_rate=0.5, freeze_ramp=0)
    params = {"w": torch.zeros(4)}
    at = optimizer.query_point(params, optimizer.init(params), step_info())
    assert torch.equal(at.active["w"], one["w"] & optimizer.subspace(1, 4).active(4))


def test_a_wrapper_that_moves_more_than_its_base_says_nothing():
    class Mixes(DPSGD):
        pass

    object.__setattr__(mixes := Mixes(lr=1), "base", freeze(freeze_rate=0.5, freeze_ramp=0))
    assert subspace_of(mixes, 1, 4) is None


def test_it_is_refused_around_zeroth_order_steps():
    base = ZerothOrder(base=DPSGD(lr=1), seed=0, steps_per_round=5)
    with pytest.raises(SettingError, match="optimizer='random-freeze' is not possible around a base"):
        freeze(base, freeze_rate=0.5, freeze_ramp=0).query_point(W, {BASE: base.init(W)}, step_info())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("freeze_rate", 1),
        ("freeze_rate", -0.1),
        ("freeze_rate", math.nan),
        ("freeze_ramp", 1.5),
        ("steps_per_round", 0),
        ("total_steps", 0),
    ],
)
def test_what_is_out_of_bounds_is_refused(name, value):
    with pytest.raises(SettingError, match=f"^{name}="):
        freeze(**{name: value})
