from __future__ import annotations

import numpy as np
import pytest

from strategies.norm_bound import scales


def test_a_long_update_is_brought_to_the_bound(updates):
    """Norms 1, 1, 10: the median is 1, so with factor 2 the last one is scaled by 2 / 10."""
    assert scales(updates([[1.0], [-1.0], [10.0]]), factor=2.0) == pytest.approx([1, 1, 0.2])


def test_zero_stays(updates):
    assert scales(updates([[0.0], [0.0]]), factor=2.0).tolist() == [1, 1]


def test_noise_is_left_whole(noisy):
    for seed in range(20):
        assert scales(noisy(seed=seed), factor=1.5).tolist() == [1] * 10


def test_what_noise_does_not_explain_is_cut(noisy):
    u = noisy()
    u.moves[0] *= 100
    assert np.sqrt(np.square(scales(u, 1.5)[0] * u.moves[0]).sum()) < 30  # noise has norm 20
