"""DPlis against the paper, by hand and over 50 steps, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.step.optimizers import DPSGD
from fed_dpsat.step.optimizers.dplis import DPlis
from fed_dpsat.testing.problems import step_info

W = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}


def test_by_hand():
    """Two draws n, m: points w + 0.5 n and w + 0.5 m of weight 1/2 each; the step is that of SGD at w."""
    optimizer = DPlis(base=DPSGD(lr=0.25), draws=2, radius=0.5)
    torch.manual_seed(3)
    at = optimizer.query_point(W, optimizer.init(W), step_info())
    torch.manual_seed(3)
    n = torch.randn(4).tolist()
    assert [weight for weight, _ in at.points] == [0.5, 0.5]
    seen = [float(point[name]) for _, point in at.points for name in W]
    assert seen == pytest.approx([1 + 0.5 * n[0], 2 + 0.5 * n[1], 1 + 0.5 * n[2], 2 + 0.5 * n[3]])
    moved, _ = optimizer.update(W, {"a": torch.tensor([4.0]), "b": torch.tensor([8.0])}, optimizer.init(W), step_info())
    assert [float(p) for p in moved.values()] == [0, 0]


def test_draws_come_before_the_clip(problem):
    """50 steps: the mean over draws is clipped, once; clipping each draw would be another method."""
    draws, radius, w, apart = 3, 0.8, problem.start, 0.0
    for step, ours in enumerate(problem.walk(DPlis(base=DPSGD(lr=problem.lr), draws=draws, radius=radius))):
        torch.manual_seed(step)
        points = []
        for _ in range(draws):
            drawn = [torch.randn(2, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)]
            points.append(w + radius * torch.cat(drawn).numpy())
        right = problem.private(step, lambda x, y, p=points: sum(problem.gradient(q, x, y) for q in p) / draws)
        wrong = problem.private(
            step, lambda x, y, p=points: sum(problem.clipped(problem.gradient(q, x, y)) for q in p) / draws
        )
        w, apart = w - problem.lr * right, max(apart, float(np.abs(wrong - right).max()))
        np.testing.assert_allclose(ours, w, rtol=1e-9, atol=1e-11)
    assert apart > 1e-3


@pytest.mark.parametrize("draws", [1, 4])
def test_without_a_radius_it_is_its_base(problem, draws):
    base = DPSGD(lr=0.3, momentum=0.9)
    for ours, theirs in zip(problem.walk(DPlis(base=base, draws=draws, radius=0)), problem.walk(base), strict=True):
        assert np.array_equal(ours, theirs)


def test_every_step_has_draws_of_its_own():
    optimizer = DPlis(base=DPSGD(lr=1), draws=3, radius=1)
    torch.manual_seed(0)
    points = [
        float(point["a"])
        for _ in range(2)
        for _, point in optimizer.query_point(W, optimizer.init(W), step_info()).points
    ]
    assert len(set(points)) == 6


@pytest.mark.parametrize(("name", "value"), [("draws", 0), ("radius", -1), ("radius", math.inf), ("radius", math.nan)])
def test_what_is_out_of_bounds_is_refused(name, value):
    with pytest.raises(SettingError, match=f"^{name}="):
        DPlis(base=DPSGD(lr=1), **{name: value})
