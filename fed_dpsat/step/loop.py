"""The one training loop: a client's round, read like the algorithm box of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.clipping import AdaptiveClipping, ClippingRule, Tally, check_clip_norm
from fed_dpsat.step.clipping.bound import Held
from fed_dpsat.step.draws import Draws, fresh_key, step_key
from fed_dpsat.step.generators import Mark, kept, seed, training_on
from fed_dpsat.step.gradients.ordinary import Ordinary
from fed_dpsat.step.gradients.per_example import LossFn, clipped_gradient_sum
from fed_dpsat.step.gradients.plain import unbounded
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.modes import in_mode
from fed_dpsat.step.noise import NOISE_SOURCES, SECRET, Purpose, derive_generator, derive_key, derive_seed
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, StepInfo, owned_update
from fed_dpsat.step.placement import device_of
from fed_dpsat.step.query import spread
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.secure_noise import system_generator
from fed_dpsat.step.unchecked import checking

Batches = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Indices ``[B]`` to ``(inputs[B, ...], targets[B])``."""


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Whose randomness this is: the generators of one client's attempt at one round.

    With ``noise_source`` "system", batches and noise have generators that no seed, call or process repeats, and so have
    the draws of examples inside a model.
    """

    seed: int
    client: int
    round: int
    attempt: int = 0
    noise_source: str = "seeded"

    def __post_init__(self) -> None:
        if self.noise_source not in NOISE_SOURCES:
            raise SettingError(
                "noise_source", self.noise_source, f"one of {', '.join(NOISE_SOURCES)}", "choose one of those"
            )

    def generator(self, purpose: Purpose) -> np.random.Generator:
        """A fresh generator at the start of its stream."""
        if self.noise_source == "system" and purpose in SECRET:
            return system_generator()
        return derive_generator(self.seed, purpose=purpose, client=self.client, round=self.round, attempt=self.attempt)

    def draws(self, step: int, indices: Tensor) -> Draws:
        """What the examples ``indices[B]`` of the client draw inside a model, in a step of the round, from 0."""
        if self.noise_source == "system" and "draws" in SECRET:
            key = fresh_key()
        else:
            key = derive_key(self.seed, purpose="draws", client=self.client, round=self.round, attempt=self.attempt)
        return Draws(key=step_key(key, step), ids=indices.cpu().numpy())

    def torch_seed(self) -> int:
        """A seed for what an optimizer draws from torch itself, such as public directions."""
        return derive_seed(self.seed, purpose="model", client=self.client, round=self.round, attempt=self.attempt)


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """What a client's round made. ``params`` and ``event`` may leave; ``nonfinite_examples`` is sensitive.

    ``clip_norm`` is where adaptive clipping stands; None for a rule of one bound.
    """

    params: Params
    state: State
    event: PrivacyEvent
    nonfinite_examples: int
    clip_norm: float | None = None


def train_locally(
    params: Params,
    batches: Batches,
    *,
    loss_fn: LossFn,
    optimizer: PrivateOptimizer,
    state: State,
    sampler: PoissonSampler,
    clipping: ClippingRule,
    mechanism: GaussianMechanism,
    local_steps: int,
    streams: Streams,
    first_step: int = 0,
    clip_norm: float | None = None,
    engine: str = "auto",
    physical_batch_size: int = 128,
) -> LocalResult:
    """``local_steps`` private steps from ``params``; each is one event of ``mechanism``, empty batch or not.

    ``first_step`` is the index of the first step among those of the federation, ``clip_norm`` where adaptive clipping
    begins, by default at its first bound.
    All is computed where ``params`` are. The data is touched through ``batches`` alone, and only the clipped sum is
    made of it; row i of a batch has to be made of example i alone, which nothing here can see. Raises ``SettingError``
    for what could cost more than the event says: a mechanism whose noise is scaled to another bound than ``clipping``
    has, factors that do not keep it, batches with more rows than examples, and a mechanism, sampler or streams of
    another class than those named here (but within ``unchecked``).
    """
    check_known(mechanism, sampler, streams)
    check_bound(mechanism, clipping)
    sampling, noise = streams.generator("sampling"), streams.generator("noise")
    adaptive = clipping if isinstance(clipping, AdaptiveClipping) else None
    bound = mechanism.clip_norm if clip_norm is None else clip_norm
    rule, of_gradient, of_count = clipping, mechanism, mechanism
    if not unbounded(clipping):
        rule = Held(rule=clipping, clip_norm=mechanism.clip_norm)
    ordinary = Ordinary.of(loss_fn, clipping, mechanism)
    # a mechanism of another class may keep what it released
    update = owned_update(optimizer) if type(mechanism) is GaussianMechanism else optimizer.update
    nonfinite = 0
    device = device_of(params)
    with training_on(device), in_mode(module_of(loss_fn), training=True):
        seed(device, streams.torch_seed())
        for step, indices in enumerate(sampler.batches(local_steps, sampling)):
            draws = streams.draws(step, indices)
            batch = made_batch(batches, indices, draws, device)
            if adaptive:
                rule = Tally(clip_norm=bound)
                of_gradient, of_count = _joint(adaptive, mechanism, bound)
            info = step_info(first_step + step, of_gradient, streams)
            at = optimizer.query_point(params, state, info)
            loss = loss_fn
            if ordinary:
                loss, of_gradient = ordinary.pair(at)
            clipped_sum, skipped = clipped_gradient_sum(
                loss, at, batch, rule, engine=engine, physical_batch_size=physical_batch_size, draws=draws
            )
            private_gradient = spread(at, of_gradient.privatize(clipped_sum, noise))
            del at, clipped_sum  # or the next pass over a batch holds three models more
            params, state = update(params, private_gradient, state, info)
            del private_gradient
            nonfinite += skipped
            if adaptive and isinstance(rule, Tally):
                below = of_count.privatize({"below": torch.tensor(rule.centred)}, noise)["below"]
                bound = check_clip_norm(adaptive.next_clip_norm(bound, float(below) + 0.5))
    return LocalResult(
        params=params,
        state=state,
        event=mechanism.event(sample_rate=sampler.sample_rate, steps=local_steps),
        nonfinite_examples=nonfinite,
        clip_norm=bound if adaptive else None,
    )


def step_info(index: int, mechanism: GaussianMechanism, streams: Streams) -> StepInfo:
    """What an optimizer is told of a step whose private gradient is that of ``mechanism``."""
    std = torch.tensor(mechanism.noise_std, dtype=torch.float64)
    return StepInfo(index=index, noise_std=std, round=streams.round)


def _joint(
    adaptive: AdaptiveClipping, mechanism: GaussianMechanism, clip_norm: float
) -> tuple[GaussianMechanism, GaussianMechanism]:
    """The mechanisms of gradient and count, which together cost the event of ``mechanism``."""
    batch_size = mechanism.expected_batch_size
    gradient, count = adaptive.noise_multipliers(mechanism.noise_multiplier, batch_size)
    if checking() and not _cost(gradient) + _cost(count) <= _cost(mechanism.noise_multiplier) * (1 + 1e-9):
        raise SettingError(
            "clipping",
            type(adaptive).__name__,
            f"one whose gradient and count cost noise_multiplier={mechanism.noise_multiplier:g} together",
            "give noise_multipliers with z_gradient^-2 + z_count^-2 <= noise_multiplier^-2",
        )
    return (
        GaussianMechanism(noise_multiplier=gradient, clip_norm=clip_norm, expected_batch_size=batch_size),
        GaussianMechanism(noise_multiplier=count, clip_norm=0.5, expected_batch_size=batch_size),
    )


def _cost(noise_multiplier: float) -> float:
    return noise_multiplier**-2 if noise_multiplier else math.inf


def check_known(mechanism: GaussianMechanism, sampler: PoissonSampler, streams: Streams) -> None:
    """Raise ``SettingError`` for a class that may add, draw or repeat something else than the event says."""
    for name, part, known in (
        ("mechanism", mechanism, GaussianMechanism),
        ("sampler", sampler, PoissonSampler),
        ("streams", streams, Streams),
    ):
        if type(part) is not known and checking():
            raise SettingError(
                name,
                type(part).__name__,
                f"a {known.__name__} itself, of which is known that it does what is charged",
                "pass one, or vouch for yours: `with fed_dpsat.step.unchecked.unchecked():`",
            )


def check_bound(mechanism: GaussianMechanism, clipping: ClippingRule) -> None:
    """Raise ``SettingError`` where noise is scaled to another bound than examples keep."""
    declared = check_clip_norm(clipping.clip_norm)
    if mechanism.clip_norm != declared:
        raise SettingError(
            "mechanism.clip_norm",
            mechanism.clip_norm,
            f"that of the clipping rule, {declared}",
            "noise is scaled to what clipping bounds; give both the same",
        )


def module_of(loss_fn: LossFn) -> object:
    """The module of a ``ModelLoss``, which a loop puts into training mode."""
    return getattr(loss_fn, "module", None)


def made_batch(batches: Batches, indices: Tensor, draws: Draws, device: torch.device) -> tuple[Tensor, Tensor]:
    """``batches(indices)``; example by example, each with generators seeded by ``draws``, if it draws from them.

    Raises ``SettingError`` as ``check_rows``.
    """
    mark = Mark.here(device)
    batch = batches(indices)
    if mark.moved() and len(indices):
        each = []
        with kept(device):
            for i, value in enumerate(draws.seeds()):
                seed(device, value)
                each.append(batches(indices[i : i + 1]))
                check_rows(each[-1], indices[i : i + 1])
        inputs, targets = zip(*each, strict=True)
        batch = torch.cat(inputs), torch.cat(targets)
    check_rows(batch, indices)
    return batch


def check_rows(batch: tuple[Tensor, Tensor], indices: Tensor) -> None:
    """Raise ``SettingError`` where a batch has more rows, or fewer, than examples were sampled."""
    if len(batch[1]) != len(indices):
        raise SettingError(
            "batches",
            len(batch[1]),
            f"{len(indices)} rows, one per sampled example",
            "views of one example belong into its loss, where clipping bounds them together",
        )
