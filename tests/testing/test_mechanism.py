"""check_mechanism passes the shipped mechanism and catches each broken one, and each broken training loop."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fed_dpsat.step.gradients.per_example import clipped_gradient_sum
from fed_dpsat.step.loop import LocalResult, Streams, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.testing import check_mechanism
from fed_dpsat.testing.problems import step_info


def wrong(name):
    """A class whose ``privatize`` or ``event`` is the decorated function."""
    return lambda function: dataclass(frozen=True, kw_only=True)(
        type(function.__name__, (GaussianMechanism,), {name: function})
    )


def scaled(share):
    @wrong("privatize")
    def mechanism(self, clipped_sum, generator):
        return replace_noise(self, share).privatize(clipped_sum, generator)

    return mechanism


def replace_noise(mechanism, share):
    return GaussianMechanism(
        noise_multiplier=mechanism.noise_multiplier * share,
        clip_norm=mechanism.clip_norm,
        expected_batch_size=mechanism.expected_batch_size,
    )


def noised(self, clipped_sum, draw, scale=None):
    """(sum + noise) / expected_batch_size with noise from ``draw(shape)``."""
    scale = self.noise_multiplier * self.clip_norm if scale is None else scale
    return {
        name: (total + scale * torch.as_tensor(draw(total.shape)).to(total)) / self.expected_batch_size
        for name, total in clipped_sum.items()
    }


@wrong("privatize")
def replaces_the_sum(self, clipped_sum, generator):
    if not self.noise_multiplier:
        return GaussianMechanism.privatize(self, clipped_sum, generator)
    return noised(self, {name: torch.zeros_like(s) for name, s in clipped_sum.items()}, generator.standard_normal)


@wrong("privatize")
def own_generator(self, clipped_sum, generator):
    return GaussianMechanism.privatize(self, clipped_sum, np.random.default_rng(0))


@wrong("privatize")
def torch_generator(self, clipped_sum, generator):
    return noised(self, clipped_sum, torch.randn)


@wrong("privatize")
def skips_zero_sums(self, clipped_sum, generator):
    if not any(bool(s.any()) for s in clipped_sum.values()):
        return clipped_sum
    return GaussianMechanism.privatize(self, clipped_sum, generator)


@wrong("privatize")
def ignores_clip_norm(self, clipped_sum, generator):
    return noised(self, clipped_sum, generator.standard_normal, self.noise_multiplier)


@wrong("privatize")
def noises_the_mean(self, clipped_sum, generator):
    mean = {name: s / self.expected_batch_size for name, s in clipped_sum.items()}
    return {n: m * self.expected_batch_size for n, m in noised(self, mean, generator.standard_normal).items()}


@wrong("privatize")
def one_draw_for_all(self, clipped_sum, generator):
    draw = generator.standard_normal()
    return noised(self, clipped_sum, lambda shape: np.full(shape, draw))


@wrong("privatize")
def one_draw_per_shape(self, clipped_sum, generator):
    draws = {s.shape: generator.standard_normal(s.shape) for s in clipped_sum.values()}
    return noised(self, clipped_sum, draws.__getitem__)


@wrong("privatize")
def forgets_scalars(self, clipped_sum, generator):
    return noised(self, clipped_sum, lambda s: generator.standard_normal(s) if len(s) else torch.zeros(s))


@wrong("privatize")
def laplace(self, clipped_sum, generator):
    return noised(self, clipped_sum, lambda shape: generator.laplace(scale=0.5**0.5, size=shape))


@wrong("privatize")
def casts(self, clipped_sum, generator):
    return {n: p.float() for n, p in GaussianMechanism.privatize(self, clipped_sum, generator).items()}


@wrong("privatize")
def in_place(self, clipped_sum, generator):
    for name, private in GaussianMechanism.privatize(self, clipped_sum, generator).items():
        clipped_sum[name].copy_(private)
    return clipped_sum


@wrong("privatize")
def does_not_divide(self, clipped_sum, generator):
    private = GaussianMechanism.privatize(self, clipped_sum, generator)
    return {name: p * self.expected_batch_size for name, p in private.items()}


@wrong("event")
def promises_more_noise(self, *, sample_rate, steps):
    return GaussianMechanism.event(replace_noise(self, 2), sample_rate=sample_rate, steps=steps)


@wrong("event")
def charges_one_step(self, *, sample_rate, steps):
    return GaussianMechanism.event(self, sample_rate=sample_rate, steps=1)


@wrong("event")
def client_rate_per_step(self, *, sample_rate, steps):
    return GaussianMechanism.event(self, sample_rate=0.1 * sample_rate, steps=steps)


@wrong("event")
def hides_that_there_is_no_noise(self, *, sample_rate, steps):
    honest = GaussianMechanism.event(self, sample_rate=sample_rate, steps=steps)
    return honest if self.noise_multiplier else replace(honest, noise_multiplier=-0.0 + 1e-9)


SIZE = "noise_has_the_declared_size"
BROKEN = {
    "0.9 sigma": (scaled(0.9), SIZE),
    "1.1 sigma": (scaled(1.1), SIZE),
    "does not scale to clip_norm": (ignores_clip_norm, SIZE),
    "noises the mean": (noises_the_mean, SIZE),
    "does not divide": (does_not_divide, SIZE),
    "Laplace": (laplace, SIZE),
    "forgets scalars": (forgets_scalars, SIZE),
    "skips empty batches": (skips_zero_sums, SIZE),
    "one draw for all": (one_draw_for_all, SIZE),
    "noise replaces the sum": (replaces_the_sum, "noise_is_added_to_the_sum"),
    "one noise for every client and round": (own_generator, "noise_is_fresh_for_every_stream"),
    "torch's generator": (torch_generator, "noise_is_fresh_for_every_stream"),
    "one draw per shape": (one_draw_per_shape, "noise_is_fresh_for_every_coordinate"),
    "casts": (casts, "keeps_names_shapes_and_types"),
    "in place": (in_place, "keeps_names_shapes_and_types"),
    "promises more noise": (promises_more_noise, "event_costs_what_was_done"),
    "charges one step": (charges_one_step, "event_costs_what_was_done"),
    "client rate times batch rate": (client_rate_per_step, "event_costs_what_was_done"),
    "hides that there is no noise": (hides_that_there_is_no_noise, "event_costs_what_was_done"),
}


def loop(params, batches, *, mechanism, sampler, local_steps, streams, divide=False, skip=False, repeat=False, **more):
    """A training loop in short, right unless told otherwise."""
    state, released = more["state"], 0
    if repeat:
        streams = Streams(seed=streams.seed, client=0, round=0)
    sampling, noise = streams.generator("sampling"), streams.generator("noise")
    for indices in sampler.batches(local_steps, sampling):
        batch = batches(indices)
        if skip and not len(indices):
            continue
        total, _ = clipped_gradient_sum(more["loss_fn"], params, batch, more["clipping"])
        if divide:
            mechanism = replace(mechanism, expected_batch_size=max(len(indices), 1))
        params, state = more["optimizer"].update(params, mechanism.privatize(total, noise), state, step_info())
        released += 1
    event = mechanism.event(sample_rate=sampler.sample_rate, steps=released)
    return LocalResult(params=params, state=state, event=event, nonfinite_examples=0)


LOOPS = {
    "skips empty batches": ({"skip": True}, "empty_batches_are_noised_and_charged"),
    "one noise for every client and round": ({"repeat": True}, "training_noise_is_fresh"),
    "divides by the realised batch size": ({"divide": True}, "training_divides_by_a_constant"),
}


def test_the_shipped_mechanism_conforms():
    assert len(check_mechanism(GaussianMechanism)) == 10


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_mechanism_is_caught(case, caught):
    factory, check = BROKEN[case]
    assert caught(check_mechanism, factory) == check


def test_a_loop_of_your_own_joins_too():
    assert check_mechanism(GaussianMechanism, train=loop) == check_mechanism(GaussianMechanism, train=train_locally)


@pytest.mark.parametrize("case", LOOPS)
def test_a_broken_loop_is_caught(case, caught):
    mistake, check = LOOPS[case]
    assert caught(check_mechanism, GaussianMechanism, train=lambda *a, **k: loop(*a, **k, **mistake)) == check
