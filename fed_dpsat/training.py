"""The one training loop: a client's round, read like the algorithm box of the papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.clipping import ClippingRule
from fed_dpsat.mechanism import GaussianMechanism
from fed_dpsat.noise import Purpose, derive_generator, derive_seed
from fed_dpsat.optimizers.base import PrivateOptimizer, State
from fed_dpsat.params import Params
from fed_dpsat.per_example import LossFn, clipped_gradient_sum
from fed_dpsat.privacy.event import PrivacyEvent
from fed_dpsat.sampling import PoissonSampler

Batches = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Indices ``[B]`` to ``(inputs[B, ...], targets[B])``."""


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Whose randomness this is: the generators of one client's attempt at one round."""

    seed: int
    client: int
    round: int
    attempt: int = 0

    def generator(self, purpose: Purpose) -> np.random.Generator:
        """A fresh generator at the start of its stream."""
        return derive_generator(self.seed, purpose=purpose, client=self.client, round=self.round, attempt=self.attempt)

    def torch_seed(self) -> int:
        """A seed for what draws from torch itself, such as dropout."""
        return derive_seed(self.seed, purpose="model", client=self.client, round=self.round, attempt=self.attempt)


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """What a client's round made. ``params`` and ``event`` may leave; ``nonfinite_examples`` is sensitive."""

    params: Params
    state: State
    event: PrivacyEvent
    nonfinite_examples: int


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
    engine: str = "vmap",
    physical_batch_size: int = 128,
) -> LocalResult:
    """``local_steps`` private steps from ``params``; each is one event of ``mechanism``, empty batch or not.

    The data is touched through ``batches`` alone, and only the clipped sum is made of it.
    """
    sampling, noise = streams.generator("sampling"), streams.generator("noise")
    nonfinite = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.torch_seed())
        for indices in sampler.batches(local_steps, sampling):
            at = optimizer.query_point(params, state)
            clipped_sum, skipped = clipped_gradient_sum(
                loss_fn,
                at,
                batches(indices),
                clipping,
                engine=engine,
                physical_batch_size=physical_batch_size,
            )
            private_gradient = mechanism.privatize(clipped_sum, noise)
            params, state = optimizer.update(params, private_gradient, state)
            nonfinite += skipped
    event = mechanism.event(sample_rate=sampler.sample_rate, steps=local_steps)
    return LocalResult(params=params, state=state, event=event, nonfinite_examples=nonfinite)
