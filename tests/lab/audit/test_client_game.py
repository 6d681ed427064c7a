"""The game of whole clients finds broken releases, and calls none that is shipped broken."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.flower.sums import ClientRelease
from fed_dpsat.flower.wire import records
from fed_dpsat.lab.audit.client_game import ClientGame, _world, play_clients
from fed_dpsat.lab.audit.command import client_game_of, run_audit
from fed_dpsat.settings.config import RunConfig

CONFIG = RunConfig(
    **{"privacy_unit": "client", "optimizer": "dp-sgd", "num_clients": 8, "clients_per_round": 4, "num_rounds": 4},
    **{"client_sampling": "poisson", "noise_multiplier": 8.0, "clip_norm": 0.5, "delta": 1e-2},
)


def game(config=CONFIG, kind=None, **changes):
    made = replace(client_game_of(config, repetitions=160, confidence=0.95), **changes)
    return replace(made, release=kind(**vars(made.release))) if kind else made


class NoNoise(ClientRelease):
    def model(self, total, before, *, round, attempt):
        quiet = replace(self.mechanism, noise_multiplier=0.0)
        return ClientRelease(**{**vars(self), "mechanism": quiet}).model(total, before, round=round, attempt=attempt)


class NothingForNobody(ClientRelease):
    """Releases the old model where nobody was drawn."""

    def model(self, total, before, *, round, attempt):
        return super().model(total, before, round=round, attempt=attempt) if total.accepted else before


class SameNoiseEachRound(ClientRelease):
    def model(self, total, before, *, round, attempt):
        return super().model(total, before, round=1, attempt=attempt)


class ByThoseWhoReplied(ClientRelease):
    def model(self, total, before, *, round, attempt):
        realised = replace(self.mechanism, expected_batch_size=float(max(len(total.accepted), 1)))
        return ClientRelease(**{**vars(self), "mechanism": realised}).model(total, before, round=round, attempt=attempt)


class BoundsTwice(ClientRelease):
    """As if a client could move the model by 40 C."""

    def model(self, total, before, *, round, attempt):
        if total.total:
            total.total = {name: 40 * t for name, t in total.total.items()}
        return super().model(total, before, round=round, attempt=attempt)


BROKEN = [NoNoise, NothingForNobody, SameNoiseEachRound, ByThoseWhoReplied, BoundsTwice]


@pytest.mark.by_default("NoNoise", "NothingForNobody")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_release_shows_more_than_its_ledger_says(kind):
    result = play_clients(game(kind=kind))
    assert result.broken, result


@pytest.mark.parametrize("changes", [{}, {"client_sampling": "fixed"}, {"noise_multiplier": 1.0, "delta": 1e-4}])
def test_the_release_stays_below_its_ledger(changes):
    result = play_clients(game(replace(CONFIG, **changes)))
    assert result.epsilon_ledger > 0
    assert not result.broken, result


def test_it_has_power():
    config = replace(CONFIG, client_sampling="fixed", noise_multiplier=1.0, delta=1e-4, num_rounds=1)
    result = play_clients(game(config, repetitions=1000))
    assert 0.6 * result.epsilon_ledger < result.epsilon_if_gaussian <= result.epsilon_ledger


def test_the_client_counts_by_the_whole_bound():
    """Without noise and sampling the two worlds are C apart, over the expected cohort."""
    seen = []

    class Telling(NoNoise):
        def model(self, total, before, *, round, attempt):
            after = super().model(total, before, round=round, attempt=attempt)
            seen.append(records.to_params(after)["w"])
            return after

    play_clients(game(replace(CONFIG, client_sampling="fixed"), kind=Telling, rounds=1, repetitions=20))
    assert float(torch.linalg.norm(seen[-1] - seen[0])) == pytest.approx(0.5 / 4)


def test_the_command_plays_it_and_has_no_canaries():
    options = {"canaries": 100, "repetitions": 40, "models": 0, "figure": None, "confidence": 0.95}
    report, words = run_audit(CONFIG, attacks=(), **options)
    assert not report["game"]["broken"]
    assert "4 releases" in words[0]
    with pytest.raises(SettingError, match="--game"):
        run_audit(CONFIG, attacks=("gradient",), **options)


@pytest.mark.parametrize(("name", "value"), [("repetitions", 10), ("rounds", 0), ("confidence", 1.0)])
def test_settings_that_make_no_game(name, value):
    with pytest.raises(SettingError, match=name):
        ClientGame(**{**vars(game()), name: value})


CORRELATED = replace(
    CONFIG,
    client_sampling="fixed",
    noise_multiplier=1.5,
    num_rounds=6,
    clients_per_round=2,
    min_separation=3,
    max_rounds_per_client=2,
)


@pytest.mark.by_default("blt")
@pytest.mark.parametrize("mechanism", ["band-mf", "blt", "tree"])
def test_correlated_noise_keeps_its_epsilon_and_less_of_it_does_not(mechanism):
    config = replace(CORRELATED, noise_mechanism=mechanism)
    made = client_game_of(config, repetitions=200, confidence=0.95)
    assert not play_clients(made).broken
    without, with_it = (_world(made, included).along.ravel() for included in (False, True))
    error = 5 * 1.5 / math.sqrt(200)
    exact = mechanism != "tree"  # whose sensitivity is an upper bound
    assert (1 if exact else 0.8) - error < with_it.mean() - without.mean() < 1 + error
    assert without.std() == pytest.approx(1.5, rel=5 / math.sqrt(400))
    quieter = replace(made.release.mechanism, noise_multiplier=0.3)
    assert play_clients(replace(made, release=replace(made.release, mechanism=quieter))).broken


def test_a_game_has_no_turns_of_groups():
    cyclic = {"noise_mechanism": "band-mf", "client_sampling": "cyclic", "noise_bands": 2}
    with pytest.raises(SettingError, match="client_sampling='cyclic'"):
        client_game_of(replace(CONFIG, **cyclic), repetitions=160, confidence=0.95)
