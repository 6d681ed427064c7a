"""The game finds every broken mechanism that we know of, and calls no shipped method broken."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from fed_dpsat.accounting import epsilon
from fed_dpsat.errors import SettingError
from fed_dpsat.lab.audit.bounds import two_world_epsilon
from fed_dpsat.lab.audit.command import game_of
from fed_dpsat.lab.audit.game import SIZE, Crafted, Game, crafted_loss, judged, play, strongest_norm
from fed_dpsat.lab.audit.scores import Seen
from fed_dpsat.params import trainable
from fed_dpsat.plugins import builtin
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.clipping import AdaptiveClipping, FlatClipping
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.clipping.global_ import GlobalClipping
from fed_dpsat.step.clipping.per_layer import PerLayerClipping
from fed_dpsat.step.clipping.psac import PSACClipping
from fed_dpsat.step.gradients.per_example import clipped_gradient_sum
from fed_dpsat.step.loop import Streams
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers import DPSAT, DPSGD, DPSATMomentum
from fed_dpsat.step.optimizers.base import ASCENT
from fed_dpsat.step.optimizers.zeroth_order import ZerothOrder
from fed_dpsat.step.sampling import PoissonSampler

SGD, FLAT = DPSGD(lr=1.0), FlatClipping(clip_norm=1.0)
SAT = DPSAT(base=SGD, rho=0.1)


def game(**settings):
    honest = {"optimizer": SGD, "clipping": FLAT, "noise_multiplier": 8.0, "delta": 1e-2, "repetitions": 120}
    return Game(**{**honest, **settings})


# broken mechanisms: what a client of the game is exchanged for


class NoNoise(GaussianMechanism):
    def privatize(self, clipped_sum, generator):
        return replace(self, noise_multiplier=0.0).privatize_honestly(clipped_sum, generator)

    privatize_honestly = GaussianMechanism.privatize


class SkipsEmpty(GaussianMechanism):
    def privatize(self, clipped_sum, generator):
        empty = not any(bool(t.any()) for t in clipped_sum.values())
        return clipped_sum if empty else super().privatize(clipped_sum, generator)


@dataclass(frozen=True, kw_only=True)
class ReusesNoise(GaussianMechanism):
    drawn: dict = field(default_factory=dict)

    def privatize(self, clipped_sum, generator):
        if not self.drawn:
            zeros = {name: torch.zeros_like(t) for name, t in clipped_sum.items()}
            self.drawn.update(super().privatize(zeros, generator))
        return {name: t / self.expected_batch_size + self.drawn[name] for name, t in clipped_sum.items()}


@dataclass(frozen=True, kw_only=True)
class RawMomentum(GaussianMechanism):
    velocity: dict = field(default_factory=dict)

    def privatize(self, clipped_sum, generator):
        for name, t in clipped_sum.items():
            self.velocity[name] = 0.99 * self.velocity.get(name, torch.zeros_like(t)) + t
        return super().privatize(dict(self.velocity), generator)


@dataclass(frozen=True, kw_only=True)
class CountingSampler(PoissonSampler):
    sizes: list = field(default_factory=list)

    def sample(self, generator):
        indices = super().sample(generator)
        self.sizes.append(len(indices))
        return indices


@dataclass(frozen=True, kw_only=True)
class RealisedMean(GaussianMechanism):
    sizes: list = field(default_factory=list)

    def privatize(self, clipped_sum, generator):
        return replace(self, expected_batch_size=float(max(self.sizes[-1], 1))).privatize_honestly(
            clipped_sum, generator
        )

    privatize_honestly = GaussianMechanism.privatize


@dataclass(frozen=True, kw_only=True)
class PerTensor:
    clip_norm: float

    def factors(self, squared_norms):
        return {name: (self.clip_norm / s.sqrt()).clamp(max=1) for name, s in squared_norms.items()}


@dataclass(frozen=True, kw_only=True)
class Telling(GaussianMechanism):
    raw: dict = field(default_factory=dict)

    def privatize(self, clipped_sum, generator):
        self.raw["sum"] = clipped_sum
        return super().privatize(clipped_sum, generator)


@dataclass(frozen=True, kw_only=True)
class RawAscent(DPSAT):
    raw: dict = field(default_factory=dict)

    def update(self, params, private_gradient, state, info):
        moved, state = super().update(params, private_gradient, state, info)
        return moved, {**state, ASCENT: self.raw["sum"]}


def exchanged(kind, **more):
    """A client with the mechanism ``kind`` of the same numbers."""
    return lambda member: replace(member, mechanism=kind(**vars(member.mechanism), **more))


def realised(member):
    sizes: list[int] = []
    sampler = CountingSampler(**vars(member.sampler), sizes=sizes)
    return replace(member, sampler=sampler, mechanism=RealisedMean(**vars(member.mechanism), sizes=sizes))


def same_seed_every_round(member):
    return replace(member, streams=SameNoise(**vars(member.streams)))


class SameNoise(Streams):
    def generator(self, purpose):
        same = replace(self, round=0) if purpose == "noise" else self
        return super(SameNoise, same).generator(purpose)


RAW: dict = {}

ZEROTH = ZerothOrder(base=SGD, seed=0, steps_per_round=4)

BROKEN = {
    "no noise": game(client=exchanged(NoNoise)),
    "no noise, one number a step": game(optimizer=ZEROTH, client=exchanged(NoNoise), local_steps=4),
    "noise reused between steps": game(client=exchanged(ReusesNoise), sample_rate=0.5, local_steps=4),
    "noise reused between rounds": game(client=same_seed_every_round, sample_rate=0.5, rounds=4),
    "each tensor clipped to C": game(clipping=PerTensor(clip_norm=1.0), noise_multiplier=2.0),
    "empty batches skipped": game(client=exchanged(SkipsEmpty), sample_rate=0.5, local_steps=6, repetitions=160),
    "momentum before the noise": game(client=exchanged(RawMomentum), local_steps=12),
    "mean by the realised batch": game(client=realised, others=4, local_steps=4),
    "a ledger that forgets rounds": game(
        ledger=lambda events, delta: epsilon(events[-1:], delta), noise_multiplier=2.0, rounds=9, repetitions=240
    ),
    "ascent along the raw gradient": game(
        optimizer=RawAscent(base=SGD, rho=0.1, raw=RAW),
        client=exchanged(Telling, raw=RAW),
        stacked=False,
        follow=True,
        others=63,
        rounds=2,
        repetitions=40,
    ),
}


SLOW = (
    *("a ledger that forgets rounds", "momentum before the noise", "empty batches skipped"),
    *("no noise, one number a step", "mean by the realised batch"),
)


@pytest.mark.by_default("no noise", "each tensor clipped to C", "noise reused between steps")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in BROKEN])
def test_a_broken_mechanism_shows_more_than_its_ledger_says(name):
    result = play(BROKEN[name])
    assert result.broken, result


SHIPPED = {
    "dp-sgd": {},
    "momentum": {"optimizer": DPSGD(lr=1.0, momentum=0.9), "local_steps": 12, "repetitions": 60},
    "dp-sat": {"optimizer": SAT, "rounds": 2, "others": 63, "follow": True},
    "dp-sat, ascent of the client's momentum": {
        "optimizer": DPSATMomentum(base=SGD, rho=0.1),
        "rounds": 2,
        "follow": True,
    },
    "automatic": {"clipping": AutomaticClipping(clip_norm=1.0)},
    "psac": {"clipping": PSACClipping(clip_norm=1.0, s=0.5)},
    "global": {"clipping": GlobalClipping(clip_norm=1.0)},
    "per-layer": {"clipping": PerLayerClipping(clip_norm=1.0)},
    "sampled": {"sample_rate": 0.5, "local_steps": 8},
    "one number a step": {"optimizer": ZEROTH, "local_steps": 4},
    "many rounds": {"noise_multiplier": 2.0, "rounds": 9, "repetitions": 60},
}
"""Each with the settings of the broken one that it is the honest counterpart of."""

QUICK = ("dp-sgd", "dp-sat", "per-layer")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n not in QUICK else n for n in SHIPPED])
def test_a_shipped_method_stays_below_its_ledger(name):
    result = play(game(**SHIPPED[name]))
    assert not result.broken, result


def test_the_adaptive_bound_stays_below_its_ledger():
    result = play(game(clipping=AdaptiveClipping(clip_norm=1.0), others=100, noise_multiplier=4.0, repetitions=40))
    assert not result.broken
    assert result.epsilon_ledger > 0


METHODS = sorted(set(builtin("optimizer")) - {"sam"})


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_private_optimizer_stays_below_its_ledger(name):
    """By its name, as a run builds it; ``sam`` is private nowhere."""
    config = RunConfig(optimizer=name, noise_multiplier=16.0, sample_rate=1.0, local_steps=2, num_rounds=1, delta=1e-2)
    follow = name != "zeroth-order"  # whose loss has to be linear, for the game to know how the example counts
    result = play(replace(game_of(config, repetitions=30, confidence=0.95), follow=follow, others=8))
    assert result.steps == 2
    assert 0 < result.epsilon_ledger < 0.5
    assert not result.broken, result


POWER = {"dp-sgd": 0.45, "dp-sat": 0.5, "per-layer": 0.45}
"""Of the mean of four seeds: one seed's share has a standard deviation of 0.15. So many repetitions bound mu from
above: two steps, of a larger mu, can show less of theirs than one."""


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_the_game_has_power_it_shows_most_of_the_epsilon_of_an_honest_gaussian(name):
    shares = []
    for seed in range(4):
        settings = {"noise_multiplier": 1.0, "others": 1, "delta": 1e-5, "repetitions": 1500, "seed": seed}
        result = play(game(**{**SHIPPED[name], **settings}))
        assert result.epsilon_if_gaussian <= result.epsilon_ledger
        assert result.epsilon_lower < result.epsilon_ledger
        shares.append(result.epsilon_if_gaussian / result.epsilon_ledger)
    assert sum(shares) / 4 > POWER[name]


def test_an_attack_chosen_by_looking_is_judged_on_what_it_has_not_seen():
    """Two worlds that are one: with confidence 0.95 at most one bound in 20 may be above 0, whatever was tried."""
    generator, found = np.random.default_rng(0), []
    for _ in range(60):
        without, with_it = (
            Seen(**{name: generator.standard_normal((100, 3)) for name in ("along", "norms", "moves")}) for _ in "ab"
        )
        _, *counts = judged(game(delta=0.0), without, with_it)
        found.append(two_world_epsilon(*counts, 0.0, 0.95) > 0)
    assert sum(found) <= 9  # of 60 at one in 20 with probability 0.999


def test_stacked_and_alone_see_the_same():
    settings = game(optimizer=SAT, sample_rate=0.5, rounds=2, repetitions=20, noise_multiplier=1.0)
    stacked, alone = play(settings), play(replace(settings, stacked=False))
    assert stacked.guess.score == alone.guess.score
    assert stacked.guess.threshold == pytest.approx(alone.guess.threshold, rel=1e-4)
    assert (stacked.false_positive_rate, stacked.epsilon_ledger) == (alone.false_positive_rate, alone.epsilon_ledger)


@pytest.mark.parametrize(
    "rule",
    [
        FLAT,
        AutomaticClipping(clip_norm=1.0),
        GlobalClipping(clip_norm=1.0, global_threshold=10.0),
        PerLayerClipping(clip_norm=1.0),
    ],
)
def test_the_example_of_the_game_is_clipped_to_the_bound(rule):
    params = trainable(Crafted())
    row = torch.zeros(1, SIZE + 1)
    row[0, :SIZE] = strongest_norm(rule, params) / SIZE**0.5
    total, _ = clipped_gradient_sum(crafted_loss(), params, (row, torch.zeros(1)), rule, engine="vmap")
    assert float(torch.cat(list(total.values())).norm()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("name", "value"), [("repetitions", 10), ("rounds", 0), ("confidence", 1.0)])
def test_settings_that_make_no_game(name, value):
    with pytest.raises(SettingError, match=name):
        game(**{name: value})


def print_table() -> None:
    """What the games of this file find, as the table of docs/audit.md: python tests/lab/audit/test_game.py."""
    for kind, games in (("broken", BROKEN), ("shipped", {name: game(**more) for name, more in SHIPPED.items()})):
        for name, played in games.items():
            found = play(played)
            print(
                f"| {kind}: {name} | {found.steps} | {found.repetitions} | {found.epsilon_lower:.2f} | "
                f"{found.epsilon_ledger:.2f} | {found.guess.score} |",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print_table()
