"""A curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"
GAP = " "


def sparkline(values: Sequence[float], width: int, ramp: str = BLOCKS) -> str:
    """``values`` from left to right in at most ``width`` characters; ``ramp`` goes from the lowest to the highest.

    ======================= ============================================
    values                  text
    ======================= ============================================
    none                    empty
    all equal               the middle of the ramp
    NaN or infinite         a gap; they do not set the scale
    more than ``width``     means of equal shares, in order
    ======================= ============================================
    """
    shown = _shares(values, width) if len(values) > width else list(values)
    finite = [value for value in shown if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join(_level(value, low, high, ramp) for value in shown)


def _shares(values: Sequence[float], width: int) -> list[float]:
    bounds = [len(values) * i // width for i in range(width + 1)]
    return [fmean(values[a:b]) for a, b in pairwise(bounds)]


def _level(value: float, low: float, high: float, ramp: str) -> str:
    if not math.isfinite(value):
        return GAP
    if low == high:
        return ramp[len(ramp) // 2]
    return ramp[min(int((value - low) / (high - low) * len(ramp)), len(ramp) - 1)]
