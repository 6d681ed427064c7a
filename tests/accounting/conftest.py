"""One short way to write an event."""

import pytest

from fed_dpsat.accounting.event import PrivacyEvent


@pytest.fixture(scope="session")
def event():
    def make(noise_multiplier=1.0, sample_rate=0.1, steps=10):
        return PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)

    return make
