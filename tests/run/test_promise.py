"""What leaves beside the updates is said, and nothing that does not leave."""

from __future__ import annotations

import dataclasses

import pytest

from fed_dpsat.run.promise import also_released
from fed_dpsat.settings.config import RunConfig

CONFIG = RunConfig(noise_multiplier=1.0, delta=1e-4)
OF_CLIENTS = {"privacy_unit": "client", "client_sampling": "poisson", "clients_per_round": 2}


@pytest.mark.parametrize(
    ("settings", "personal", "expected"),
    [
        ({}, False, []),
        ({"release_counts": True}, False, ["without a finite gradient"]),
        ({"validation_share": 0.1}, False, ["validation_share holds out of the private training data"]),
        ({}, True, ["shares of the public test split"]),
        ({"validation_share": 0.1}, True, ["validation_share holds out", "shares of the validation examples"]),
        (OF_CLIENTS, False, []),
        ({**OF_CLIENTS, "loggers": "tensorboard"}, False, ["how many clients were drawn"]),
        ({**OF_CLIENTS, "loggers": "tensorboard", "client_sampling": "fixed"}, False, []),
    ],
)
def test_each_release_that_epsilon_does_not_cover_is_named(settings, personal, expected):
    found = also_released(dataclasses.replace(CONFIG, **settings), personal=personal)
    assert len(found) == len(expected)
    assert all(words in line and "not covered by epsilon" in line for words, line in zip(expected, found, strict=True))
