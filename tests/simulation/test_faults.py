"""Dropouts and delays come from the seed, stay charged, and change nothing but who is in the mean."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.simulation.faults import Faults

pytestmark = pytest.mark.usefixtures("untried")  # the trial has tests of its own: tests/client/test_trial.py

CONFIG = RunConfig(noise_multiplier=2.0, delta=1e-4, num_clients=6, num_rounds=3)
SETTINGS = dataclasses.replace(
    CONFIG, seed=3, dropout_rate=0.3, delay="exponential", delay_mean=2.0, client_timeout=5.0
)
FAULTS = Faults(SETTINGS)


def draws(faults, count=4000):
    return [(faults.drops_out(c, r), faults.seconds(c, r)) for r in range(1, 41) for c in range(count // 40)]


def test_faults_are_what_they_say_and_repeat():
    away, seconds = zip(*draws(FAULTS), strict=True)
    assert draws(FAULTS) == list(zip(away, seconds, strict=True))
    assert stats.binomtest(sum(away), len(away), 0.3).pvalue > 1e-3
    assert stats.binomtest(sum(away), len(away), 0.35).pvalue < 1e-3
    assert stats.kstest(seconds, stats.expon(scale=2.0).cdf).pvalue > 1e-3
    assert stats.kstest(seconds, stats.expon(scale=2.2).cdf).pvalue < 1e-3
    assert abs(np.corrcoef(away, seconds)[0, 1]) < 0.05


def test_a_lognormal_delay_has_its_mean():
    seconds = [s for _, s in draws(Faults(dataclasses.replace(SETTINGS, delay="lognormal")), 10_000)]
    assert abs(np.mean(seconds) - 2.0) < 0.1
    assert stats.kstest(np.log(seconds), stats.norm(np.log(2.0) - 0.5, 1).cdf).pvalue > 1e-3


def test_faultless_clients_draw_nothing():
    assert Faults.of(CONFIG) is None
    assert not Faults(dataclasses.replace(SETTINGS, client_timeout=0.0)).comes_late(0, 1)


def lines(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_who_is_away_or_late_is_named_and_stays_charged_and_the_run_goes_on(tmp_path):
    config = dataclasses.replace(
        CONFIG, dropout_rate=0.4, delay="exponential", delay_mean=1.0, client_timeout=1.0, seed=SETTINGS.seed
    )
    simulate(config, tmp_path / "run")
    faults = Faults.of(config)
    for line in lines(tmp_path / "run")[1:]:
        expected = {
            str(c): "dropped out" if faults.drops_out(c, line["round"]) else "client_timeout=1 "
            for c in range(6)
            if faults.drops_out(c, line["round"]) or faults.comes_late(c, line["round"])
        }
        assert line["dropped"].keys() == expected.keys()
        assert all(reason in line["dropped"][client] for client, reason in expected.items())
        assert line["accepted"] == 6 - len(expected)
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite", readonly=True) as ledger:
        assert ledger.rounds_by_client() == dict.fromkeys(range(6), 3)


def test_a_round_in_which_all_are_away_keeps_the_model_and_is_no_failure(tmp_path):
    config = dataclasses.replace(CONFIG, num_clients=1, dropout_rate=0.999, num_rounds=5)
    summary = simulate(config, tmp_path / "run")
    assert summary["status"] == "completed"
    assert [line["kept_model"] for line in lines(tmp_path / "run")] == [False] + [True] * 5


@pytest.mark.parametrize("never", [{"dropout_rate": 1.0}, {"delay": "lognormal", "delay_mean": math.inf}])
def test_what_lets_nobody_ever_reply_is_refused(never):
    with pytest.raises(SettingError, match="no client would ever reply"):
        dataclasses.replace(CONFIG, **never)
