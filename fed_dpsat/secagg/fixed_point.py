"""Real vectors as whole numbers modulo 2^64, so that masks cancel to the bit and sums do not depend on their order."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

LARGEST_MOVE = 1024.0
"""Coordinates of an update are bounded to it. One that is longer is cut; a model that moves so far is lost anyway."""


def fraction_bits(total_weight: float) -> int:
    """Binary digits behind the point so that a sum of ``total_weight`` times ``LARGEST_MOVE`` stays below 2^62.

    Raises ``ValueError`` where none would be left.
    """
    bits = 62 - math.ceil(math.log2(total_weight * LARGEST_MOVE))
    if bits < 16:
        raise ValueError(f"{total_weight:g} examples leave {bits} binary digits behind the point, fewer than 16")
    return bits


def error_bound(num_clients: int, total_weight: float) -> float:
    """Largest error of a coordinate of the mean: half a unit a client, over the total weight, and float64 rounding."""
    of_rounding = num_clients * 0.5 * 2.0 ** -fraction_bits(total_weight) / total_weight
    return of_rounding + (num_clients + 1) * LARGEST_MOVE * 2.0**-52


def encode(move: NDArray[np.floating], weight: float, bits: int) -> NDArray[np.uint64]:
    """``weight * move`` in units of 2^-bits, rounded to nearest, negative ones as two's complement.

    Raises ``ValueError`` for NaN.
    """
    if np.isnan(move).any():
        raise ValueError("an update with NaN cannot be summed")
    bounded = np.clip(move.astype(np.float64), -LARGEST_MOVE, LARGEST_MOVE)
    return np.rint(bounded * (weight * 2.0**bits)).astype(np.int64).view(np.uint64)


def decode(total: NDArray[np.uint64], total_weight: float, bits: int) -> NDArray[np.float64]:
    """The mean behind a sum. Raises ``ValueError`` for one that no clients can have: masks did not cancel."""
    signed = total.view(np.int64).astype(np.float64)
    mean: NDArray[np.float64] = signed / (total_weight * 2.0**bits)
    if np.abs(mean).max(initial=0) > LARGEST_MOVE * 1.001:
        raise ValueError("the sum is beyond what clients can send: masks did not cancel")
    return mean
