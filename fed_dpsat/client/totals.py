"""Noised totals over all clients, by one Gaussian mechanism for all lines together.

A line is a vector to which one unit adds at most norm 1. L lines stacked have at most norm sqrt(L): that is the clip
norm, and the event is one Gaussian of ``noise_multiplier`` z without sampling. A line alone is one of z sqrt(L).

========== =========================================== ================================= =========================
unit       a client adds                               noise                             one unit changes the sum by
========== =========================================== ================================= =========================
"example"  the sum over its rows                       of each client, on its own sum    at most norm 1 a line
"client"   that sum over max(m, its number of rows)    of the server, once               at most norm 1 a line
========== =========================================== ================================= =========================

m is ``statistics_examples``: a client with n rows has the weight min(1, n / m).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fed_dpsat.accounting.evaluations import KIND
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import SERVER, Purpose, derive_generator
from fed_dpsat.step.secure_noise import system_generator

Floats = NDArray[np.float64]


def event_of(noise_multiplier: float, unit: str, steps: int = 1) -> PrivacyEvent:
    """``steps`` Gaussian mechanisms on all units, without sampling."""
    return PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=1.0, steps=steps, kind=KIND[unit])


def weights_of(sizes: Floats, config: RunConfig) -> Floats:
    """``[num_clients]``: the factor of each client's sum over its rows, whose numbers are ``sizes``."""
    if config.privacy_unit == "example":
        return np.ones(len(sizes))
    return 1 / np.maximum(sizes, config.statistics_examples)


def noised_totals(
    added: Mapping[str, Floats],
    noise_multiplier: float,
    config: RunConfig,
    purpose: Purpose,
    *,
    round: int = 0,
    attempt: int = 0,
) -> dict[str, Floats]:
    """By line, the sum over clients ``[d]`` of ``added[num_clients, d]`` with noise.

    Each client adds noise of its own with the unit "example", else the server adds it once.
    """
    mechanism = GaussianMechanism(
        noise_multiplier=noise_multiplier, clip_norm=math.sqrt(len(added)), expected_batch_size=1
    )

    def noised(sums: Floats, client: int) -> Floats:
        if config.noise_source == "system":
            generator: np.random.Generator = system_generator()
        else:
            generator = derive_generator(config.seed, purpose=purpose, client=client, round=round, attempt=attempt)
        found: Floats = mechanism.privatize({"lines": torch.from_numpy(sums)}, generator)["lines"].numpy()
        return found

    stacked = np.concatenate(list(added.values()), axis=1)
    if config.privacy_unit == "client":
        total = noised(stacked.sum(0), SERVER)
    else:
        total = np.zeros(stacked.shape[1])
        for client, own in enumerate(stacked):
            total += noised(own, client)
    ends = np.cumsum([one.shape[1] for one in added.values()])
    return dict(zip(added, np.split(total, ends[:-1]), strict=True))


def noise_of_totals(num_lines: int, noise_multiplier: float, config: RunConfig) -> float:
    """The standard deviation of each number of the totals."""
    shares = config.num_clients if config.privacy_unit == "example" else 1
    return noise_multiplier * math.sqrt(num_lines * shares)
