"""What a round of the unit "client" releases: the sum of bounded changes, noised by the server that is trusted to.

======================================= ===================================================================
case                                    what is released
======================================= ===================================================================
nobody drawn, nobody replied            noise: else a round would tell that nobody was there
fewer replied than were drawn           their sum and the same noise, divided by the same constant
a reply beyond the bound                not in the sum, and named
======================================= ===================================================================

Source: McMahan et al. 2018 (arXiv 1710.06963), with the estimator whose denominator is a constant. The proof is in
``docs/privacy.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord

from fed_dpsat.flower.sums import Part
from fed_dpsat.flower.wire import records
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import derive_generator
from fed_dpsat.step.secure_noise import system_generator


@dataclass(frozen=True, kw_only=True)
class ClientRelease:
    """``mechanism`` has the bound C of one client, and divides by the EXPECTED size of a cohort, a constant.

    ``every_client`` says that a round costs all clients and not only those drawn: they have coins.
    """

    mechanism: GaussianMechanism
    every_client: bool
    seed: int
    noise_source: str

    @classmethod
    def of(cls, config: RunConfig, noise_multiplier: float) -> ClientRelease | None:
        """As ``config`` says; None where its unit is another."""
        if config.privacy_unit != "client":
            return None
        return cls(
            mechanism=GaussianMechanism(
                noise_multiplier=noise_multiplier,
                clip_norm=config.clip_norm,
                expected_batch_size=float(config.cohort_size),
            ),
            every_client=config.client_sampling == "poisson",
            seed=config.seed,
            noise_source=config.noise_source,
        )

    def model(self, total: Part, before: ArrayRecord, *, round: int, attempt: int) -> ArrayRecord:
        """``before`` and the private mean of the moves that ``total`` adds up, in the types of ``before``."""
        start = records.to_params(before)
        moves = total.total or {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.items()}
        mean = self.mechanism.privatize(moves, self._generator(round, attempt))
        return records.to_arrays({name: (v.double() + mean[name]).to(v.dtype) for name, v in start.items()})

    def _generator(self, round: int, attempt: int) -> np.random.Generator:
        if self.noise_source == "system":
            return system_generator()
        return derive_generator(self.seed, purpose="noise", round=round, attempt=attempt)
