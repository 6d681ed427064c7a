"""Flower ships an RDP accountant of its own over dp_accounting; ours agrees with it over a random grid."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from fed_dpsat.privacy import PrivacyEvent, epsilon

DRAW = np.random.default_rng(0)
GRID = [
    (
        float(DRAW.uniform(0.7, 6)),
        int(DRAW.integers(5, 500)),
        int(DRAW.integers(1, 2000)),
        float(10 ** DRAW.uniform(-7, -3)),
    )
    for _ in range(12)
]
POPULATION = 1000


@pytest.mark.parametrize(("noise", "sample", "steps", "delta"), GRID)
def test_flowers_rdp_accountant_agrees(noise, sample, steps, delta):
    config = PrivacyConfig(
        target_delta=delta,
        population_size=POPULATION,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.POISSON,
    )
    theirs = RdpAccountant(config)
    theirs.compose(GaussianPrivacyEvent(noise_multiplier=noise, sample_size=sample, population_size=POPULATION), steps)
    event = PrivacyEvent(noise_multiplier=noise, sample_rate=sample / POPULATION, steps=steps)
    assert epsilon([event], delta, "rdp") == pytest.approx(theirs.get_epsilon(delta), rel=1e-6)
    assert epsilon([event], delta) <= theirs.get_epsilon(delta) * (1 + 1e-3)
