"""Who is asked in a round: drawn by partition from a seeded generator, so that rates are the ones accounted."""

from __future__ import annotations

from collections.abc import Collection

from fed_dpsat.noise import derive_generator


def toss_cohort(seed: int, round: int, eligible: Collection[int], rate: float) -> list[int]:
    """Each of the ``eligible`` clients by a coin of its own of probability ``rate``, ascending; may be empty."""
    clients = sorted(eligible)
    coins = derive_generator(seed, purpose="cohort", round=round).random(len(clients))
    return [client for client, coin in zip(clients, coins, strict=True) if coin < rate]


def draw_cohort(seed: int, round: int, eligible: Collection[int], size: int) -> list[int]:
    """``size`` of the ``eligible`` clients, uniformly without replacement, ascending; all where fewer are left."""
    clients = sorted(eligible)
    if len(clients) <= size:
        return clients
    generator = derive_generator(seed, purpose="cohort", round=round)
    return sorted(int(c) for c in generator.choice(clients, size=size, replace=False, shuffle=False))
