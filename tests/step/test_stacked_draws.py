"""Coins and noise of a stack: those of each client's own streams, independent, with the deviation that is charged."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from fed_dpsat.accounting.event import LAPLACE
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.loop import Member, Streams, Turn
from fed_dpsat.step.mechanism import GaussianMechanism, LaplaceMechanism
from fed_dpsat.step.noise import (
    WORDS,
    derive_generator,
    derive_key,
    keyed_normals,
    keyed_words,
    standard_normals,
    uniforms,
)
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.stacked import StackedRounds

CLIENTS = (0, 3, 1)
KEYS = [derive_key(5, purpose="noise", client=client, round=2, attempt=1) for client in CLIENTS]


def generators():
    return [derive_generator(5, purpose="noise", client=client, round=2, attempt=1) for client in CLIENTS]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 5, 41, 4096])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_words_are_those_of_the_generators(start, count):
    found = keyed_words(KEYS, start, count)
    for row, generator in zip(found, generators(), strict=True):
        assert (row == generator.integers(0, 2**64, size=start + count, dtype=np.uint64)[start:]).all()


def test_uniforms_are_those_of_the_generators():
    for row, generator in zip(uniforms(keyed_words(KEYS, 7, 50)), generators(), strict=True):
        assert (row == generator.random(57)[7:]).all()


@pytest.mark.parametrize("count", [1, 2, 7, 500, 2 * WORDS, 2 * WORDS + 1, 4 * WORDS + 3])
def test_normals_of_each_step_are_those_of_the_generators(count):
    """Also of a model whose words are drawn in several goes."""
    own = generators()
    for step in range(3):
        found = keyed_normals(KEYS, step, count)
        assert found.shape == (len(KEYS), count)
        for row, generator in zip(found, own, strict=True):
            torch.testing.assert_close(row, standard_normals(generator, count), rtol=1e-6, atol=1e-6)


def member(client=0, *, sigma=1.5, size=40, rate=0.3, clip_norm=0.5, source="seeded", **streams):
    sampler = PoissonSampler(num_examples=size, sample_rate=rate)
    return Member(
        batches=lambda indices: (indices, indices),
        state={},
        sampler=sampler,
        mechanism=GaussianMechanism(
            noise_multiplier=sigma, clip_norm=clip_norm, expected_batch_size=sampler.expected_batch_size
        ),
        streams=Streams(seed=1, client=client, round=1, noise_source=source, **streams),
    )


def drawn_of_each(rounds):
    drawn = rounds.drawn()
    return torch.split(drawn.places, drawn.counts.tolist())


def released(members, steps=1, shape=(50, 100), clip_norm=0.5):
    """What each step releases of sums of zeros, on the scale of the sums: ``[steps, K, numbers]``."""
    rounds, found = StackedRounds(members, FlatClipping(clip_norm=clip_norm), steps), []
    wide = torch.tensor([m.mechanism.expected_batch_size for m in members])[:, None]
    for step in range(steps):
        rounds.begin(step)
        rounds.drawn()
        zeros = {"a": torch.zeros(len(members), *shape), "b": torch.zeros(len(members), 3)}
        private = rounds.release(zeros, torch.zeros(len(members), dtype=torch.int64))
        found.append(torch.cat([p.flatten(1) for p in private.values()], 1) * wide)
    return torch.stack(found)


SAME = {"sigma": [1.5] * 4, "size": [40] * 4, "rate": [0.3] * 4}
COHORTS = {
    "alike": SAME,
    "other sizes": SAME | {"size": [40, 9, 77, 40]},
    "other noise": SAME | {"sigma": [1.5, 0.4, 3.0, 1.5]},
    "some without noise": SAME | {"sigma": [1.5, 0.0, 3.0, 0.0]},
    "other rates": SAME | {"rate": [0.3, 1.0, 0.05, 0.6]},
}


def cohort(name, source):
    columns = COHORTS[name]
    return [
        member(client, source=source, **{key: values[client] for key, values in columns.items()})
        for client in range(len(columns["sigma"]))
    ]


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("source", ["seeded", "system"])
@pytest.mark.parametrize("name", COHORTS)
def test_noise_of_each_client_and_step_is_its_own_and_has_its_deviation(name, source):
    """No deviation by 10 % passes, and no draw that a client or a step shares with another."""
    members = cohort(name, source)
    found = released(members, steps=2).double()
    count = found.shape[2]
    streams = []
    for k, one in enumerate(members):
        scale = one.mechanism.noise_multiplier * one.mechanism.clip_norm
        for row in found[:, k]:
            if not scale:
                assert not row.any()
                continue
            assert abs(float(row.std()) / scale - 1) < 5 / math.sqrt(2 * count)
            assert stats.kstest((row / scale).numpy(), "norm").pvalue > 1e-5
            streams.append(row.numpy())
    apart = np.corrcoef(np.stack(streams)) - np.eye(len(streams))
    assert np.abs(apart).max() < 5.5 / math.sqrt(count)


@pytest.mark.usefixtures("repeatable")
def test_noise_of_the_system_is_never_there_again():
    first, second = (released(cohort("alike", "system")) for _ in range(2))
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 5 / math.sqrt(first.numel())


@pytest.mark.parametrize("name", COHORTS)
def test_seeded_noise_and_coins_are_those_of_each_client_alone(name):
    members, steps = cohort(name, "seeded"), 3
    rule = FlatClipping(clip_norm=0.5)
    rounds, turns = StackedRounds(members, rule, steps), [Turn(one, rule, steps) for one in members]
    for step in range(steps):
        info, infos = rounds.begin(step), [turn.begin(step) for turn in turns]
        assert info.noise_std.tolist() == [float(one.noise_std) for one in infos]
        for places, turn in zip(drawn_of_each(rounds), turns, strict=True):
            assert places.tolist() == turn.drawn().tolist()
        sums = {"a": torch.ones(4, 7, 3), "b": torch.zeros(4)}
        private = rounds.release(sums, torch.zeros(4, dtype=torch.int64))
        for k, turn in enumerate(turns):
            for key, expected in turn.release({n: t[k].clone() for n, t in sums.items()}, 0).items():
                torch.testing.assert_close(private[key][k], expected, rtol=1e-6, atol=1e-6)
    for event, one in zip(rounds.events(), members, strict=True):
        assert event == one.mechanism.event(sample_rate=one.sampler.sample_rate, steps=steps)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("source", ["seeded", "system"])
@pytest.mark.parametrize("name", ["other sizes", "other rates"])
def test_coins_fall_at_each_clients_rate_and_apart_from_the_others(name, source):
    members, steps = cohort(name, source), 400
    rounds = StackedRounds(members, FlatClipping(clip_norm=0.5), steps)
    coins = [np.zeros((steps, one.sampler.num_examples)) for one in members]
    for step in range(steps):
        rounds.begin(step)
        for heads, places in zip(coins, drawn_of_each(rounds), strict=True):
            heads[step, places.numpy()] = 1
    for one, heads in zip(members, coins, strict=True):
        rate = one.sampler.sample_rate
        assert abs(heads.mean() - rate) <= 5 * math.sqrt(rate * (1 - rate) / heads.size)
        assert np.abs(heads.mean(0) - rate).max() <= 5 * math.sqrt(rate * (1 - rate) / steps)
    both = [heads[:, :9].ravel() for heads in coins if 0 < heads.mean() < 1]
    apart = np.corrcoef(np.stack(both)) - np.eye(len(both))
    assert np.abs(apart).max() < 5.5 / math.sqrt(both[0].size)


def test_another_round_attempt_or_purpose_is_another_stream():
    once = released([member(0), member(1)])[0]
    again = released([member(0, attempt=1), dataclasses.replace(member(1), streams=Streams(seed=1, client=1, round=2))])
    assert not (once == again[0]).any()


class Wider(GaussianMechanism):
    """One that adds 100 to each sum."""

    def privatize(self, clipped_sum, generator):
        private = super().privatize(clipped_sum, generator)
        return {name: p + 100 / self.expected_batch_size for name, p in private.items()}


class First(PoissonSampler):
    """One that always draws its first example alone."""

    def sample(self, generator):
        return torch.tensor([0])


class Fixed(Streams):
    """Streams whose keys are those of client 9."""

    def generator(self, purpose):
        return derive_generator(self.seed, purpose=purpose, client=9, round=self.round)


def test_parts_of_a_class_of_their_own_are_asked_as_alone():
    own = member(1)
    other = dataclasses.replace(own, mechanism=Wider(**vars(own.mechanism)))
    assert float(released([member(0), other])[0, 1].mean()) == pytest.approx(100, abs=0.1)
    rounds = StackedRounds(
        [member(0), dataclasses.replace(own, sampler=First(**vars(own.sampler)))], FlatClipping(clip_norm=0.5), 1
    )
    rounds.begin(0)
    assert drawn_of_each(rounds)[1].tolist() == [0]
    other = dataclasses.replace(own, streams=Fixed(seed=1, client=1, round=1))
    torch.testing.assert_close(released([member(0), other])[0, 1], released([member(0), member(9)])[0, 1])


def test_an_infinite_bound_without_noise_leaves_the_sums():
    members = [member(client, sigma=0.0, clip_norm=math.inf) for client in range(2)]
    assert not released(members, clip_norm=math.inf).any()


def test_a_client_without_noise_keeps_its_sum_beside_others_on_the_grid():
    members = [member(0, sigma=0.0, source="system"), member(1, source="system")]
    rounds = StackedRounds(members, FlatClipping(clip_norm=0.5), 1)
    rounds.begin(0)
    private = rounds.release({"w": torch.full((2, 3), 1e-9)}, torch.zeros(2, dtype=torch.int64))["w"]
    torch.testing.assert_close(private[0] * 12, torch.full((3,), 1e-9), rtol=1e-6, atol=0)


def test_laplace_noise_is_laplace_noise_in_a_stack():
    members = []
    for client in range(200):
        one = member(client)
        members.append(dataclasses.replace(one, mechanism=LaplaceMechanism(**vars(one.mechanism))))
    rounds = StackedRounds(members, FlatClipping(clip_norm=0.5), 1)
    rounds.begin(0)
    zeros = {name: torch.zeros(200) for name in "abcdefghij"}
    private = rounds.release(zeros, torch.zeros(200, dtype=torch.int64))
    scale = members[0].mechanism.noise_multiplier * 0.5 / members[0].mechanism.expected_batch_size
    assert stats.kstest(torch.cat(list(private.values())).double().numpy() / scale, "laplace").pvalue > 1e-4
    assert {event.kind for event in rounds.events()} == {LAPLACE}
