from __future__ import annotations

import numpy as np
import pytest

from strategies.fedexp import step


def test_clients_that_disagree_lengthen_the_step(updates):
    """Four orthogonal updates of norm 1: their mean has norm^2 1/4, so the step is 1 / (2 / 4); of two it is 1."""
    assert step(updates(np.eye(4)), most=10.0) == pytest.approx(2.0)
    assert step(updates(np.eye(2)), most=10.0) == pytest.approx(1.0)
    assert step(updates([[1.0, 0.0], [1.0, 0.0]]), most=10.0) == 1.0


def test_it_is_bounded_and_zero_divides_nothing(updates):
    assert step(updates([[1.0, 0.1], [-1.0, 0.1]]), most=3.0) == 3.0
    assert step(updates([[1.0], [-1.0]]), most=3.0) == 1.0


def test_noise_alone_asks_for_no_step(noisy):
    """Uncorrected, ten clients under noise would ask for nearly five times the step."""
    u = noisy()
    assert step(u, most=100.0) == pytest.approx(1.0, abs=0.3)
    u.variances[:] = 0
    assert step(u, most=100.0) > 4


def test_disagreement_is_still_seen_through_noise(updates):
    generator = np.random.default_rng(0)
    moves = 100 * np.eye(10, 400) + generator.standard_normal((10, 400))
    assert step(updates(moves, variances=1.0), most=100.0) == pytest.approx(4.8, abs=0.15)
