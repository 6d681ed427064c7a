"""One run for all tests of reports; it is not to be changed, but copied."""

from __future__ import annotations

import pytest

from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate


@pytest.fixture(scope="package")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    simulate(RunConfig(num_clients=4, num_rounds=3, target_epsilon=3.0, delta=1e-4, lr=8.0), folder)
    return folder
