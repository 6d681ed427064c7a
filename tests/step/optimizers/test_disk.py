"""DiSK against the paper, by hand and over 50 steps; its limits, and that composing with it works."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.optimizers.base import ASCENT
from fed_dpsat.step.optimizers.disk import DiSK
from fed_dpsat.step.query import Query
from fed_dpsat.testing.problems import step_info

W = {"w": torch.tensor([1.0, 2.0])}


def g(*values):
    return {"w": torch.tensor(values)}


def test_by_hand():
    """kappa 0.5, gamma 2, lr 1. g = (4, 8): m = (2, 4), w = (1, 2) - m = (-1, -2), so d = -m, and c = 0.5 / (2 * 0.5).

    The next query is half of w and half of w + 2 d = (-5, -10). g = (0, 2): m = (1, 2) + (0, 1) = (1, 3).
    """
    optimizer = DiSK(base=DPSGD(lr=1), kappa=0.5, gamma=2)
    state = optimizer.init(W)
    assert optimizer.query_point(W, state, step_info()) is W
    params, state = optimizer.update(W, g(4.0, 8.0), state, step_info())
    assert params["w"].tolist() == [-1, -2]
    at = optimizer.query_point(params, state, step_info())
    assert [(weight, point["w"].tolist()) for weight, point in at.points] == [(0.5, [-1, -2]), (0.5, [-5, -10])]
    params, state = optimizer.update(params, g(0.0, 2.0), state, step_info())
    assert params["w"].tolist() == [-2, -5]


def test_one_pass_by_hand():
    """kappa 0.5 and gamma = 0.5 / 0.5 = 1: c is 1, and the one point is w + d."""
    for gamma in (0.0, 1.0):
        optimizer = DiSK(base=DPSGD(lr=1), kappa=0.5, gamma=gamma)
        params, state = optimizer.update(W, g(4.0, 8.0), optimizer.init(W), step_info())
        at = optimizer.query_point(params, state, step_info())
        assert not isinstance(at, Query)
        assert at["w"].tolist() == [-3, -6]


@pytest.mark.by_default("0.7-0.0", "0.9-0.01")
@pytest.mark.parametrize(("kappa", "gamma"), [(0.7, 0.5), (0.7, 0.0), (0.3, 4.0), (0.9, 0.01)])
def test_fifty_steps_of_the_paper(problem, kappa, gamma):
    w, before, m = problem.start, problem.start, np.zeros_like(problem.start)
    look = gamma or (1 - kappa) / kappa
    c = (1 - kappa) / (kappa * look)
    optimizer = DiSK(base=DPSGD(lr=problem.lr), kappa=kappa, gamma=gamma)
    for step, ours in enumerate(problem.walk(optimizer)):
        ahead = w + look * (w - before)
        observed = problem.private(
            step, lambda x, y, w=w, a=ahead: (1 - c) * problem.gradient(w, x, y) + c * problem.gradient(a, x, y)
        )
        m = (1 - kappa) * m + kappa * observed
        w, before = w - problem.lr * m, w
        np.testing.assert_allclose(ours, w, rtol=1e-9, atol=1e-11)


def test_without_a_filter_it_is_its_base(problem):
    base = DPSGD(lr=0.3, momentum=0.9)
    for ours, theirs in zip(problem.walk(DiSK(base=base, kappa=1)), problem.walk(base), strict=True):
        assert np.array_equal(ours, theirs)
    assert not np.array_equal(list(problem.walk(DiSK(base=base)))[-1], ours)


def test_dp_sat_over_disk_climbs_both_points():
    optimizer = DPSAT(base=DiSK(base=DPSGD(lr=1), kappa=0.5, gamma=2), rho=5)
    params, state = optimizer.update(W, g(3.0, 4.0), optimizer.init(W), step_info())
    assert params["w"].tolist() == [-0.5, 0]
    assert state[ASCENT]["w"].tolist() == [3, 4]
    at = optimizer.query_point(params, state, step_info())
    assert [point["w"].tolist() for _, point in at.points] == [[2.5, 4], [-0.5, 0]]


def test_the_change_is_that_of_the_model_also_where_a_round_began_elsewhere():
    optimizer = DiSK(base=DPSGD(lr=1), kappa=0.5)
    _, state = optimizer.update(W, g(4.0, 8.0), optimizer.init(W), step_info())
    assert optimizer.query_point(g(2.0, 2.0), state, step_info())["w"].tolist() == [3, 2]


@pytest.mark.parametrize("kappa", [0, -0.1, 1.1, math.nan])
def test_a_gain_outside_its_bounds_is_refused(kappa):
    with pytest.raises(SettingError, match=r"^kappa=.* is not in \(0, 1\]; "):
        DiSK(base=DPSGD(lr=1), kappa=kappa)


@pytest.mark.parametrize("gamma", [-1, math.inf, math.nan])
def test_a_look_ahead_outside_its_bounds_is_refused(gamma):
    with pytest.raises(SettingError, match=r"^gamma=.* is not in \[0, inf\); "):
        DiSK(base=DPSGD(lr=1), gamma=gamma)
