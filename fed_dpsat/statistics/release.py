"""From the rows of all clients to noised totals, by one Gaussian mechanism for all lines together.

Each line adds at most norm 1 for one unit, so L lines stacked add at most sqrt(L): that is the clip norm, and the event
is one Gaussian of ``noise_multiplier`` z without sampling. A line alone is one of z sqrt(L).

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
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fed_dpsat.accounting.event import CLIENTS, DISTRIBUTIONS, PrivacyEvent
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.statistics.lines import Count, Line
from fed_dpsat.statistics.rows import Floats, Rows
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import SERVER, derive_generator
from fed_dpsat.step.secure_noise import system_generator

KIND = {"example": DISTRIBUTIONS["gaussian"], "client": CLIENTS}
"""By privacy unit, the kind of event of a Gaussian mechanism."""


def event_of(noise_multiplier: float, unit: str) -> PrivacyEvent:
    """One Gaussian mechanism on all units, without sampling."""
    return PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=1.0, steps=1, kind=KIND[unit])


def contributions(lines: Sequence[Line], rows: Rows, config: RunConfig) -> dict[str, Floats]:
    """By line, ``[num_clients, d]``: what each client adds; one unit has at most norm 1 in each."""
    sums = {line.name: line.sums(rows) for line in lines}
    if config.privacy_unit == "example":
        return sums
    weights = 1 / np.maximum(rows.sizes, config.statistics_examples)
    of_rows = {line.name for line in lines if not line.of_clients}
    return {name: total * weights[:, None] if name in of_rows else total for name, total in sums.items()}


def noised_totals(added: Mapping[str, Floats], noise_multiplier: float, config: RunConfig) -> dict[str, Floats]:
    """By line, the sum over clients ``[d]`` with noise: of each client with the unit "example", else of the server."""
    mechanism = GaussianMechanism(
        noise_multiplier=noise_multiplier, clip_norm=math.sqrt(len(added)), expected_batch_size=1
    )
    stacked = np.concatenate(list(added.values()), axis=1)
    if config.privacy_unit == "client":
        total = _noised(stacked.sum(0), mechanism, config, SERVER)
    else:
        total = np.zeros(stacked.shape[1])
        for client, own in enumerate(stacked):
            total += _noised(own, mechanism, config, client)
    ends = np.cumsum([one.shape[1] for one in added.values()])
    return dict(zip(added, np.split(total, ends[:-1]), strict=True))


def noise_of_totals(num_lines: int, noise_multiplier: float, config: RunConfig) -> float:
    """The standard deviation of each number of the totals."""
    shares = config.num_clients if config.privacy_unit == "example" else 1
    return noise_multiplier * math.sqrt(num_lines * shares)


def with_count(lines: Sequence[Line], unit: str) -> list[Line]:
    """``lines`` and, if statistics of rows need it and the number of rows is private, their count."""
    needed = unit == "client" and any(not line.of_clients for line in lines)
    return [*lines, *([Count()] if needed else [])]


def _noised(sums: Floats, mechanism: GaussianMechanism, config: RunConfig, client: int) -> Floats:
    """``sums[d]`` of one client, or of all for the server, with noise."""
    if config.noise_source == "system":
        generator: np.random.Generator = system_generator()
    else:
        generator = derive_generator(config.seed, purpose="statistics", client=client)
    found: Floats = mechanism.privatize({"lines": torch.from_numpy(sums)}, generator)["lines"].numpy()
    return found
