"""Real vectors as integers modulo 2^64, so that masks cancel exactly and a sum does not depend on its order."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

LARGEST_MOVE = 1024.0
"""Each coordinate of an update is clipped to this bound; a larger update has no use in training."""


def fraction_bits(total_weight: float) -> int:
    """Binary digits after the point at which a sum of ``total_weight`` times ``LARGEST_MOVE`` stays below 2^62.

    Raises ``ValueError`` for fewer than 16.
    """
    bits = 62 - math.ceil(math.log2(total_weight * LARGEST_MOVE))
    if bits < 16:
        raise ValueError(f"{total_weight:g} examples leave {bits} binary digits after the point, fewer than 16")
    return bits


def encode(move: NDArray[np.floating], weight: float, bits: int) -> NDArray[np.uint64]:
    """``weight * move`` in units of 2^-bits, rounded to nearest; negative numbers as two's complement.

    Raises ``ValueError`` for NaN.
    """
    if np.isnan(move).any():
        raise ValueError("an update with NaN cannot be summed")
    bounded = np.clip(move.astype(np.float64), -LARGEST_MOVE, LARGEST_MOVE)
    return np.rint(bounded * (weight * 2.0**bits)).astype(np.int64).view(np.uint64)


def decode(total: NDArray[np.uint64], total_weight: float, bits: int) -> NDArray[np.float64]:
    """The mean of a sum. Raises ``ValueError`` for a sum beyond the range of clients: masks did not cancel."""
    signed = total.view(np.int64).astype(np.float64)
    mean: NDArray[np.float64] = signed / (total_weight * 2.0**bits)
    if np.abs(mean).max(initial=0) > LARGEST_MOVE * 1.001:
        raise ValueError("the sum is beyond the range of clients: masks did not cancel")
    return mean
