"""The server's side: which strategies it takes, and what it warns about."""

from __future__ import annotations

import pytest
from flwr.serverapp.strategy import FedAvg

from fed_dpsat.config import RunConfig
from fed_dpsat.flower.federation import build_strategy
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.plugins import PluginError


def named(strategy):
    return RunConfig(noise_multiplier=1.0, strategy=strategy)


def test_a_built_in_a_stock_and_a_file(tmp_path):
    assert isinstance(build_strategy(named("fedavg")), FedAvg)
    assert type(build_strategy(named("flwr.serverapp.strategy:FedYogi"))).__name__ == "FedYogi"
    (tmp_path / "mine.py").write_text("from flwr.serverapp.strategy import Krum\ndef build(seed):\n    return Krum()\n")
    assert type(build_strategy(named(f"{tmp_path}/mine.py:build"))).__name__ == "Krum"


def test_what_is_no_strategy_is_refused():
    with pytest.raises(FederationError, match="made a Fraction, not a Flower Strategy"):
        build_strategy(named("fractions:Fraction"))
    with pytest.raises(PluginError, match="wrap it in one"):
        build_strategy(named("builtins:dict"))


def test_a_wrong_name_lists_the_near_ones():
    with pytest.raises(PluginError, match="did you mean fedavg"):
        build_strategy(named("fedavgg"))
