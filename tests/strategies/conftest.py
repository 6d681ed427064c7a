"""Updates whose answers a reader can compute."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fed_dpsat.flower.updates import Updates


@pytest.fixture
def updates() -> Callable[..., Updates]:
    """``updates([[1, 2], [3, 4]], variances=0.5, sizes=[1, 1])``."""

    def make(moves: object, variances: object = 0.0, sizes: object = None) -> Updates:
        array = np.asarray(moves, dtype=float)
        weights = np.ones(len(array)) if sizes is None else np.asarray(sizes, dtype=float)
        return Updates(
            moves=array,
            shares=weights / weights.sum(),
            variances=np.broadcast_to(np.asarray(variances, dtype=float), len(array)).copy(),
        )

    return make


@pytest.fixture
def noisy(updates) -> Callable[..., Updates]:
    """Ten clients with one signal of norm ``signal`` in ``d`` dimensions, under noise of variance 1 each."""

    def make(d: int = 400, signal: float = 1.0, seed: int = 0) -> Updates:
        generator = np.random.default_rng(seed)
        common = np.full(d, signal / np.sqrt(d))
        return updates(common + generator.standard_normal((10, d)), variances=1.0)

    return make
