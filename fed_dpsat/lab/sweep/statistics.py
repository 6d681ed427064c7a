"""Statistics over seeds: means, standard deviations and 95 % intervals by Student's t."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fed_dpsat.run.numbers import estimate


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None for one value."""
    return estimate(values).sd if len(values) > 1 else None


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean, by Student's t; None for one value."""
    return estimate(values).half_width if len(values) > 1 else None


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``mean (sd)``; for one value the value, without values a dash."""
    if not values:
        return "-"
    sd = deviation(values)
    return f"{statistics.mean(values):.{digits}f}" + ("" if sd is None else f" ({sd:.{digits}f})")


def difference(values: Sequence[float], reference: Sequence[float], digits: int = 1) -> str:
    """Mean of paired differences with its 95 % interval, one pair per seed; bold if the interval excludes 0.

    ``values`` and ``reference`` have the same seeds in the same order. One pair has no interval.
    """
    pairs = [a - b for a, b in zip(values, reference, strict=True)]
    if not pairs:
        return "-"
    mean, half = statistics.mean(pairs), half_width(pairs)
    if half is None:
        return f"{mean:+.{digits}f}"
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text
