"""Who is asked in a round: drawn by partition from a seeded generator, so that rates are the ones accounted."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.step.noise import derive_generator


def toss_cohort(
    seed: int,
    round: int,
    eligible: Collection[int] | NDArray[np.int64],
    rate: float,
    generator: np.random.Generator | None = None,
) -> list[int]:
    """Each of the ``eligible`` clients by a coin of its own of probability ``rate``, ascending; may be empty.

    A ``generator`` tosses in the place of the seed's.
    """
    clients = _ascending(eligible)
    coins = (generator or derive_generator(seed, purpose="cohort", round=round)).random(len(clients))
    cohort: list[int] = clients[coins < rate].tolist()
    return cohort


def draw_cohort(seed: int, round: int, eligible: Collection[int] | NDArray[np.int64], size: int) -> list[int]:
    """``size`` of the ``eligible`` clients, uniformly without replacement, ascending; all where fewer are left."""
    clients = _ascending(eligible)
    if len(clients) > size:
        generator = derive_generator(seed, purpose="cohort", round=round)
        clients = np.sort(generator.choice(clients, size=size, replace=False, shuffle=False))
    cohort: list[int] = clients.tolist()
    return cohort


def _ascending(clients: Collection[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.sort(clients if isinstance(clients, np.ndarray) else np.array(list(clients), dtype=np.int64))
