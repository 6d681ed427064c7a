"""Poisson batches: every example joins every batch by its own coin, so a batch may be empty."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class PoissonSampler:
    """Batches of ``num_examples`` examples at ``sample_rate``; the rate that runs is the rate that is charged.

    ``num_examples`` is declared public: the mean divides by ``expected_batch_size``, a constant.

    Raises ``SettingError`` for a rate outside (0, 1] or no examples.
    """

    num_examples: int
    sample_rate: float

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise SettingError(
                "sample_rate", self.sample_rate, "in (0, 1]", "lower it, or give the client more examples"
            )
        if self.num_examples < 1:
            raise SettingError(
                "num_examples",
                self.num_examples,
                "at least 1",
                "use fewer clients, or a partition that leaves none empty",
            )

    @property
    def expected_batch_size(self) -> float:
        """``sample_rate * num_examples``, what the mechanism divides by."""
        return self.sample_rate * self.num_examples

    def sample(self, generator: np.random.Generator) -> Tensor:
        """Indices of one batch, int64 ``[B]``, ascending; ``B`` is random and may be 0."""
        coins = generator.random(self.num_examples) < self.sample_rate
        return torch.from_numpy(np.flatnonzero(coins))

    def batches(self, steps: int, generator: np.random.Generator) -> Iterator[Tensor]:
        """``steps`` batches; as the ``sampler`` of a DataLoader with ``batch_size=None`` it may be empty too."""
        for _ in range(steps):
            yield self.sample(generator)
