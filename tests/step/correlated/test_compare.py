"""The comparison of correlated with independent noise, against reference numbers."""

from __future__ import annotations

import dataclasses

import pytest

from fed_dpsat import RunConfig
from fed_dpsat.step.correlated.compare import partial_sums

CONFIG = RunConfig(
    privacy_unit="client",
    noise_mechanism="band-mf",
    noise_multiplier=4.224679,
    delta=1e-6,
    num_clients=1000,
    clients_per_round=10,
    num_rounds=1000,
    noise_bands=4,
    min_separation=100,
    max_rounds_per_client=10,
)


@pytest.mark.parametrize(
    ("changes", "mean", "largest"),
    [
        ({}, 36.148, 50.725),
        ({"noise_mechanism": "blt", "noise_bands": 0}, 12.194, 15.187),
        ({"noise_mechanism": "bisr", "noise_bands": 16}, 15.987, None),
    ],
)
def test_partial_sums_have_the_reference_errors(changes: dict[str, object], mean: float, largest: float | None) -> None:
    found = partial_sums(dataclasses.replace(CONFIG, **changes), 4.224679)  # type: ignore[arg-type]
    assert found.mean == pytest.approx(4.224679 * mean, rel=0.01)
    assert largest is None or found.largest == pytest.approx(4.224679 * largest, rel=0.01)
    assert (found.independent_mean, found.independent_largest) == pytest.approx((298.9, 422.5), rel=0.01)
    assert found.keeps == "a client is in at most 10 of 1000 rounds, at least 100 apart"


def test_cyclic_coins_are_compared_with_coins() -> None:
    """Ten epochs at a rate of 1 %: 32.90 with 4 bands, 35.00 with DP-SGD at its own noise of 1.5644."""
    config = dataclasses.replace(CONFIG, client_sampling="cyclic", min_separation=1, max_rounds_per_client=0)
    found = partial_sums(config, 2.8785)
    assert (found.mean, found.independent_mean) == pytest.approx((32.90, 35.00), rel=0.01)
    assert found.independent_noise_multiplier == pytest.approx(1.5644, rel=0.005)
    assert found.keeps == "a client has a coin in every 4th round, that of its group, with probability 0.04"
