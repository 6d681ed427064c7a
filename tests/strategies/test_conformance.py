"""Every shipped strategy conforms, with and without privacy noise, as a run would build it."""

from __future__ import annotations

import pytest

from fed_dpsat import RunConfig, plugins
from fed_dpsat.errors import SettingError
from fed_dpsat.flower.federation import build_strategy
from fed_dpsat.testing import check_strategy, strategy
from fed_dpsat.testing.half import HALF_CHECKS

AVERAGING = {"fedavg", "noise-aware"}
WITH_A_HALF = {"ditto", "mr-mtl", "dp-scaffold"}
USING_NOISE = sorted(plugins.builtin("strategy").keys() - {"fedavg"} - WITH_A_HALF)


OF_VALUES = (
    strategy.zero_update_stays_finite,
    strategy.equal_replies_move_that_way,
    strategy.empty_rounds_keep_the_model,
    strategy.weights_are_not_negative_and_sum_to_one,
)
"""The checks whose answer depends on the noise: the others see who is asked, and what is done with bad replies."""


def factory(name, private):
    config = RunConfig(strategy=name, private=private, noise_multiplier=float(private), lr=0.1)
    return lambda: build_strategy(config)


@pytest.mark.by_default("fedavg-True", "kalman-True")
@pytest.mark.parametrize("private", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", plugins.builtin("strategy"))
def test_every_shipped_strategy_conforms(name, private):
    made = check_strategy(factory(name, private), averaging=name in AVERAGING)
    assert len(made) == 10 + (name in AVERAGING) + len(HALF_CHECKS) * (name in WITH_A_HALF)


@pytest.mark.by_default("noise-aware")
@pytest.mark.parametrize("name", plugins.builtin("strategy"))
def test_without_noise_too(name, monkeypatch):
    monkeypatch.setattr(strategy, "CHECKS", OF_VALUES)
    assert check_strategy(factory(name, private=False), averaging=name in AVERAGING)


@pytest.mark.parametrize("name", USING_NOISE)
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("momentum", 0.9),
        ("clipping", "adaptive"),
        ("optimizer", "a.b:c"),
        ("base_optimizer", "d"),
        ("base_optimizer", "dp-sgd+d"),
        ("update_codec", "top-k"),
    ],
)
def test_what_uses_known_noise_refuses_where_it_is_unknown(name, setting, value):
    with pytest.raises(SettingError, match=f"{setting}=.*noise is unknown to '{name}'"):
        build_strategy(RunConfig(strategy=name, noise_multiplier=1.0, **{setting: value}))


def test_fedavg_does_not_care():
    build_strategy(RunConfig(strategy="fedavg", noise_multiplier=1.0, momentum=0.9))
