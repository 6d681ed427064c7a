"""Conformance of mechanisms: noise of the declared size on the sum at every step, and a matching event."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fed_dpsat.accounting.accountant import epsilon
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.params import Params
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.loop import LocalResult, Streams, train_locally
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.testing.conformance import require, run_checks
from fed_dpsat.testing.noise import (
    Subject,
    make,
    noise_has_the_declared_size,
    noise_is_added_to_the_sum,
    noise_is_fresh_for_every_coordinate,
    noise_is_fresh_for_every_stream,
    stream,
)
from fed_dpsat.testing.problems import TrainLoop, Watching, copied, kind, prescribed

STEPS, EXAMPLES, RATE, GRADIENT = 30, 8, 0.125, 0.25
FIRST = Streams(seed=0, client=0, round=1)


def check_mechanism(factory: Callable[..., Any], *, train: TrainLoop = train_locally) -> list[str]:
    """Run the suite on a factory with the parameters of ``GaussianMechanism``; returns the names of the checks.

    ``train`` replaces the training loop. Raises ``ConformanceError``.
    """
    return run_checks("mechanism", CHECKS, Subject(make=factory, train=train))


def keeps_names_shapes_and_types(subject: Subject) -> None:
    """The private gradient has the names, shapes and types of the sum, and the sum does not change."""
    total = {
        "w": torch.ones(3, 2),
        "wide": torch.ones(2, dtype=torch.float64),
        "scale": torch.ones(()),
        "none": torch.ones(0),
    }
    private = make(subject).privatize(given := copied(total), stream())
    expected, seen = ({n: kind(t) for n, t in tensors.items()} for tensors in (total, private))
    require(seen == expected, expected=str(expected), seen=str(seen), remedy="return tensors like those of the sum")
    require(
        all(torch.equal(given[n], t) for n, t in total.items()),
        expected="an unchanged sum",
        seen="a sum changed in place",
        remedy="add the noise to a copy",
    )


def divides_by_the_expected_batch_size(subject: Subject) -> None:
    """Without noise the result is the sum over expected_batch_size, for any sum: the realised size is private."""
    for batch, value in itertools.product((0.5, 1.0, 64.0), (0.0, 1.0, -250.0)):
        mechanism = make(subject, noise_multiplier=0.0, expected_batch_size=batch)
        seen = float(mechanism.privatize({"w": torch.full((2,), value)}, stream())["w"][0])
        require(
            math.isclose(seen, value / batch, rel_tol=1e-6),
            expected=f"{value:g} / expected_batch_size={batch:g} with noise_multiplier=0",
            seen=f"{seen:g}",
            remedy="divide by the constant expected_batch_size, and add nothing for noise_multiplier=0",
        )


def event_costs_what_was_done(subject: Subject) -> None:
    """The event has at most the declared noise and at least the given rate and steps; without noise it costs inf."""
    for noise, rate, steps in ((1.0, 0.1, 1), (0.5, 1.0, 7), (4.0, 0.01, 1000)):
        event: PrivacyEvent = make(subject, noise_multiplier=noise).event(sample_rate=rate, steps=steps)
        require(
            event.noise_multiplier <= noise and event.sample_rate >= rate and event.steps >= steps,
            expected=f"an event of noise_multiplier={noise}, sample_rate={rate}, steps={steps}, or a costlier one",
            seen=str(event),
            remedy="charge the added noise, the rate of the sampler and every step",
        )
    spent = epsilon([make(subject, noise_multiplier=0.0).event(sample_rate=0.1, steps=1)], 1e-5)
    require(
        spent == math.inf,
        expected="epsilon = inf for noise_multiplier=0",
        seen=f"epsilon = {spent:g}",
        remedy="put noise_multiplier=0 into the event of a step without noise",
    )


def empty_batches_are_noised_and_charged(subject: Subject) -> None:
    """In training with mostly empty batches, each step releases noise and is charged."""
    released, sizes, result = _trained(subject, noise_multiplier=1.0)
    noise = [float(step["w"].abs().sum()) for step in released]
    require(
        0 in sizes and len(noise) == len(sizes) == STEPS and all(noise),
        expected=f"{STEPS} noised releases, some from empty batches",
        seen=f"{sum(n > 0 for n in noise)} noised of {len(noise)} releases from batches of {sizes}",
        remedy="treat an empty batch like any other: a zero sum plus noise",
    )
    require(
        result.event.steps >= STEPS and result.event.noise_multiplier <= 1,
        expected=f"an event of {STEPS} steps at noise_multiplier=1",
        seen=str(result.event),
        remedy="charge every step, also for an empty batch",
    )


def training_noise_is_fresh(subject: Subject) -> None:
    """In training, the noise of any two steps, clients, rounds or attempts differs."""
    released = []
    for client, round, attempt in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)):
        streams = Streams(seed=0, client=client, round=round, attempt=attempt)
        steps, _, _ = _trained(subject, noise_multiplier=1.0, streams=streams)
        released += [float(step["w"][1]) for step in steps]  # the coordinate without a gradient
    require(
        len(set(released)) == len(released),
        expected=f"{len(released)} different draws in 4 rounds of {STEPS} steps",
        seen=f"{len(set(released))}",
        remedy="use one generator per (client, round, attempt), from Streams, for all steps",
    )


def training_divides_by_a_constant(subject: Subject) -> None:
    """In training without noise, a batch of k equal gradients g releases k g / expected_batch_size."""
    released, sizes, _ = _trained(subject, noise_multiplier=0.0)
    seen = [round(float(step["w"][0]), 4) for step in released]
    expected = [round(GRADIENT * k / (RATE * EXAMPLES), 4) for k in sizes]
    require(
        len(set(sizes)) > 2 and seen == expected,
        expected=f"{expected} from batches of {sizes}",
        seen=str(seen),
        remedy="divide by sample_rate * num_examples: the realised batch size is private",
    )


CHECKS = (
    keeps_names_shapes_and_types,
    noise_has_the_declared_size,
    noise_is_added_to_the_sum,
    divides_by_the_expected_batch_size,
    noise_is_fresh_for_every_stream,
    noise_is_fresh_for_every_coordinate,
    event_costs_what_was_done,
    empty_batches_are_noised_and_charged,
    training_noise_is_fresh,
    training_divides_by_a_constant,
)


def _trained(
    subject: Subject, noise_multiplier: float, streams: Streams = FIRST
) -> tuple[list[Params], list[int], LocalResult]:
    """The releases and the batch sizes of a round; every example has the gradient (1, 0) / 4."""
    sampler = PoissonSampler(num_examples=EXAMPLES, sample_rate=RATE)
    optimizer, sizes = Watching(), []
    rows = torch.tensor([[GRADIENT, 0.0]]).repeat(EXAMPLES, 1)

    def batch(indices: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(indices))
        return rows[indices], torch.zeros(len(indices))

    result = subject.train(
        {"w": torch.zeros(2)},
        batch,
        loss_fn=prescribed,
        optimizer=optimizer,
        state={},
        sampler=sampler,
        clipping=FlatClipping(clip_norm=1.0),
        mechanism=make(subject, noise_multiplier, expected_batch_size=sampler.expected_batch_size),
        local_steps=STEPS,
        streams=streams,
    )
    return optimizer.released, sizes, result
