"""Shamir's secret sharing: any ``threshold`` shares give the secret, fewer reveal nothing (Shamir 1979)."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

PRIME = 2**521 - 1
"""A Mersenne prime above any secret of 64 bytes."""

SHARE_BYTES = 66


def split(secret: bytes, holders: Iterable[int], threshold: int) -> dict[int, bytes]:
    """A share per holder: the value at holder + 1 of a random polynomial of degree ``threshold - 1``.

    Holders are numbers from 0. Raises ``ValueError`` for more shares than holders, or a secret above 64 bytes.
    """
    names = sorted(holders)
    if not 1 <= threshold <= len(names) or len(set(names)) != len(names) or names[0] < 0:
        raise ValueError(f"threshold={threshold} is not in [1, {len(names)}], or holders={names} are not distinct")
    if len(secret) > 64:
        raise ValueError(f"a secret of {len(secret)} bytes is longer than 64")
    polynomial = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {name: _value(polynomial, name + 1).to_bytes(SHARE_BYTES, "big") for name in names}


def combine(shares: Mapping[int, bytes], length: int) -> bytes:
    """The secret of ``length`` bytes from at least ``threshold`` shares, by Lagrange interpolation at 0.

    Raises ``ValueError`` for too few shares, or shares of different secrets.
    """
    points = {name + 1: int.from_bytes(share, "big") for name, share in shares.items()}
    total = 0
    for x, y in points.items():
        above = below = 1
        for other in points:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        total = (total + y * above * pow(below, -1, PRIME)) % PRIME
    try:
        return total.to_bytes(length, "big")
    except OverflowError:
        raise ValueError("there are too few shares, or shares of different secrets") from None


def _value(polynomial: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value
