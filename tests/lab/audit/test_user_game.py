"""The game about a person: the honest step stays below its ledger, and each broken one shows more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fed_dpsat.lab.audit.command import game_of
from fed_dpsat.lab.audit.game import Game, play
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.bundles import Bundles
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.persons import Persons
from fed_dpsat.step.sampling import PoissonSampler

EACH = 32


def game(**settings):
    honest = {
        "optimizer": DPSGD(lr=1.0),
        "clipping": FlatClipping(clip_norm=1.0),
        "noise_multiplier": 8.0,
        "delta": 1e-2,
        "repetitions": 60,
        "examples_each": EACH,
    }
    return Game(**{**honest, **settings})


class InParts(Persons):
    """The rows of a person in ``parts`` bundles, as if they were of so many persons."""

    parts = EACH

    def chosen(self, drawn, draws):
        for places, bundles in super().chosen(drawn, draws):
            yield places, Bundles(torch.ones(len(bundles.weights) * self.parts, bundles.rows // self.parts))


class InChunks(InParts):
    parts = 16


def with_persons(kind):
    return lambda member: replace(member, persons=kind(**vars(member.persons)))


def coins_per_row(member):
    rows = len(member.persons.places)
    return replace(
        member, persons=None, sampler=PoissonSampler(num_examples=rows, sample_rate=member.sampler.sample_rate)
    )


BROKEN = {
    "clip per row": {"client": with_persons(InParts)},
    "a person in chunks": {"client": with_persons(InChunks)},
    "coins per row": {"client": coins_per_row},
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.by_default("clip per row", "coins per row")
def test_a_broken_unit_shows_more_than_its_ledger_says(name):
    result = play(game(**BROKEN[name]))
    assert result.broken, result


SHIPPED = {
    "dp-sgd": {},
    "automatic": {"clipping": AutomaticClipping(clip_norm=1.0)},
    "dp-sat": {"optimizer": DPSAT(base=DPSGD(lr=1.0), rho=0.1), "rounds": 2, "others": 31, "follow": True},
    "sampled": {"sample_rate": 0.5, "local_steps": 4},
}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.by_default("dp-sgd")
def test_the_shipped_unit_stays_below_its_ledger(name):
    result = play(game(**SHIPPED[name]))
    assert not result.broken, result


def test_the_game_of_a_run_about_persons():
    config = RunConfig(privacy_unit="user", user_column="writer", user_examples=5, noise_multiplier=2.0)
    found = game_of(config, repetitions=20, confidence=0.95)
    assert found.examples_each == 5
