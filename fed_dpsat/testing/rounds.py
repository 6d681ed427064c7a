"""The training checks in the suite of optimizers: rounds, physical batches, and the use of data."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from fed_dpsat.params import Params, flatten, global_norm, subtract, unflatten
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.loop import LocalResult, Streams
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, next_round
from fed_dpsat.step.query import spread
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.testing.conformance import require
from fed_dpsat.testing.problems import (
    TrainLoop,
    copied,
    difference,
    filled,
    normal_like,
    quadratic,
    step_info,
)

SHAPES = {"weight": (3, 2), "bias": (3,)}
ROUNDS, STEPS, EXAMPLES, RATE = 3, 4, 12, 0.5
PHYSICAL = (100, 3, 1)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """``make()`` gives the optimizer, ``make_still()`` the same with lr = 0, and ``train`` is the training loop."""

    make: Callable[[], PrivateOptimizer]
    make_still: Callable[[], PrivateOptimizer] | None
    train: TrainLoop


@dataclass(frozen=True, kw_only=True)
class Recording(GaussianMechanism):
    """A mechanism that stores every private gradient."""

    released: list[Params] = field(default_factory=list)

    def privatize(self, clipped_sum: Params, generator: np.random.Generator) -> Params:
        """As the Gaussian mechanism."""
        private = super().privatize(clipped_sum, generator)
        self.released.append(copied(private))
        return private


def training_is_replayed_from_private_gradients_alone(subject: Subject) -> None:
    """The private gradients of the rounds of a client give its weights to the bit, without data.

    The check fails for an optimizer that uses an example in another way, or loses state between two rounds.
    """
    params, replayed = _start(), _start()
    state, again = subject.make().init(params), subject.make().init(replayed)
    for round in range(1, ROUNDS + 1):
        mechanism = _mechanism()
        result = _trained(subject, subject.make(), params, through_bytes(state), round, mechanism=mechanism)
        params, state = result.params, result.state
        optimizer, again = subject.make(), again if round == 1 else next_round(subject.make(), replayed, again)
        torch.default_generator.manual_seed(_streams(round).torch_seed())
        for step, private_gradient in enumerate(mechanism.released):
            info = step_info((round - 1) * STEPS + step, mechanism.noise_std, round)
            at = optimizer.query_point(replayed, again, info)
            replayed, again = optimizer.update(replayed, spread(at, private_gradient), again, info)
        said = difference(params, replayed)
        require(
            len(mechanism.released) == STEPS and not said,
            expected=f"{STEPS} private gradients that give the trained weights in a replay",
            seen=f"{len(mechanism.released)} gradients, and other weights in round {round}: {said}",
            remedy="use only the private gradient, and carry the state (such as momentum) from round to round",
        )


def physical_batches_change_nothing(subject: Subject) -> None:
    """Physical batches of 100, 3 and 1 examples give the same weights, within 1e-5."""
    whole, *cut = (_all_rounds(subject, subject.make, size) for size in PHYSICAL)
    for size, params in zip(PHYSICAL[1:], cut, strict=True):
        away = float(global_norm(subtract(params, whole)))
        require(
            away <= 1e-5 * (1 + float(global_norm(whole))),
            expected=f"the weights of physical_batch_size={PHYSICAL[0]}",
            seen=f"weights {away:.3g} away at physical_batch_size={size}",
            remedy="compute the query point once per step, not once per physical batch, and change nothing in place",
        )


def zero_lr_keeps_every_bit(subject: Subject) -> None:
    """With lr = 0 the weights keep their bits, for any physical batch size."""
    make = subject.make_still
    if make is None:
        return
    for size in PHYSICAL:
        params = _all_rounds(subject, make, size)
        said = difference(_start(), params)
        require(
            not said,
            expected="unchanged weights with lr = 0",
            seen=f"{said} after {ROUNDS * STEPS} steps at physical_batch_size={size}",
            remedy="step from the unperturbed weights; do not move to the query point and back",
        )


def through_bytes(state: State) -> State:
    """``state`` after a round trip through storage, with flat names and arrays."""
    buffer = io.BytesIO()
    torch.save({key: torch.from_numpy(value.numpy().copy()) for key, value in flatten(state).items()}, buffer)
    buffer.seek(0)
    return unflatten(torch.load(buffer, weights_only=True))


def _start() -> Params:
    """Random parameters: from zeros, a move and its inverse would be exact."""
    return normal_like(filled(SHAPES), 0)


def _all_rounds(subject: Subject, make: Callable[[], PrivateOptimizer], physical_batch_size: int) -> Params:
    params = _start()
    state = make().init(params)
    for round in range(1, ROUNDS + 1):
        result = _trained(subject, make(), params, state, round, physical_batch_size=physical_batch_size)
        params, state = result.params, result.state
    return params


def _trained(
    subject: Subject,
    optimizer: PrivateOptimizer,
    params: Params,
    state: State,
    round: int,
    *,
    mechanism: GaussianMechanism | None = None,
    physical_batch_size: int = 100,
) -> LocalResult:
    rows = torch.randn(EXAMPLES, 9, generator=torch.Generator().manual_seed(0))
    return subject.train(
        params,
        lambda indices: (rows[indices], torch.zeros(len(indices))),
        loss_fn=quadratic,
        optimizer=optimizer,
        state=state if round == 1 else next_round(optimizer, params, state),
        first_step=(round - 1) * STEPS,
        sampler=PoissonSampler(num_examples=EXAMPLES, sample_rate=RATE),
        clipping=FlatClipping(clip_norm=1.0),
        mechanism=mechanism or _mechanism(),
        local_steps=STEPS,
        streams=_streams(round),
        physical_batch_size=physical_batch_size,
    )


def _mechanism() -> Recording:
    return Recording(noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=EXAMPLES * RATE)


def _streams(round: int) -> Streams:
    return Streams(seed=0, client=0, round=round)
