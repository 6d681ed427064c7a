from __future__ import annotations

import numpy as np
import pytest

from strategies.geometric_median import geometric_median


def test_the_median_of_points_on_a_line(updates):
    """Of 0, 1 and 100 it is 1."""
    assert geometric_median(updates([[0.0], [1.0], [100.0]])) == pytest.approx([1.0], abs=1e-3)


def test_of_a_square_and_its_center(updates):
    corners = [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]
    assert geometric_median(updates(corners)) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_equal_updates_are_their_median(updates):
    assert geometric_median(updates([[2.0, 3.0]] * 3)) == pytest.approx([2.0, 3.0])
    assert geometric_median(updates([[0.0, 0.0]] * 3)) == pytest.approx([0.0, 0.0])


def test_it_weighs_by_size(updates):
    assert geometric_median(updates([[0.0], [1.0]], sizes=[1, 3])) == pytest.approx([1.0], abs=1e-3)


def test_under_noise_alone_it_is_the_mean(noisy):
    u = noisy()
    assert geometric_median(u) == pytest.approx(u.mean)


@pytest.mark.parametrize("far", [1e2, 1e6, 1e12])
def test_an_attacker_does_not_pull_it_along(noisy, far):
    u = noisy()
    honest = u.moves[3:].mean(0)
    u.moves[:3] -= far
    away = np.sqrt(np.square(geometric_median(u) - honest).sum())
    assert away < 60  # three of ten pull within the noise, whose norm is 20
    assert np.sqrt(np.square(u.mean - honest).sum()) > 0.25 * far * 20
