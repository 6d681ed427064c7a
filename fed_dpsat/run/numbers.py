"""Numbers for readers: estimates with intervals, rounded to the digits that the interval supports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fed_dpsat.tasks.metric import PERCENT, Metric, Value

MISSING = "\u2013"
NORMAL_QUANTILE = 1.959964
"""The 97.5 % quantile of the standard normal."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean and standard deviation of ``n`` values, and half of the 95 % interval of the mean; NaN for n = 1."""

    n: int
    mean: float
    sd: float
    half_width: float

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """The estimate from ``values[n]``, n at least 1, by Student's t with n - 1 degrees of freedom."""
    from scipy.stats import t  # type: ignore[import-untyped]

    n = len(values)
    if n == 1 or not all(math.isfinite(v) for v in values):
        return Estimate(n=n, mean=fmean(values), sd=math.nan, half_width=math.nan)
    sd = stdev(values)
    return Estimate(n=n, mean=fmean(values), sd=sd, half_width=float(t.ppf(0.975, n - 1)) * sd / math.sqrt(n))


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a probability after a ``share`` of hits in ``n`` draws (Wilson 1927); [0, 1] for n = 0."""
    if not n:
        return 0.0, 1.0
    z2 = NORMAL_QUANTILE**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_QUANTILE / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def decimals(half_width: float) -> int:
    """Digits after the point: two significant digits of ``half_width`` if it starts with 1 or 2, else one."""
    if not 0 < half_width < math.inf:
        return 1
    first = math.floor(math.log10(half_width))
    return max(0, -first + (1 if half_width < 3 * 10**first else 0))


def rounded(value: float, half_width: float) -> str:
    """``value`` with the digits that its interval supports."""
    return f"{value:.{decimals(half_width)}f}" if math.isfinite(value) else plain(value)


def plain(value: object, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits; infinity as ∞, None and NaN as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if isinstance(value, int):
        return f"{value:,}"
    value = float(f"{value:.{digits}g}")
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def percent(share: float | None, n: int | None = None) -> str:
    """``share`` as percent, with the digits that ``n`` draws support."""
    if share is None or math.isnan(share):
        return MISSING
    digits = 1
    if n:
        low, high = wilson(share, n)
        digits = min(2, decimals(100 * (high - low) / 2) or 0)
    return f"{100 * share:.{digits}f} %"


def in_unit(value: Value | None, metric: Metric, n: int | None = None) -> str:
    """``value`` of ``metric`` with its unit, on a page; ``n`` is the number of draws if it is a share of draws.

    =================== ======================================================
    value               text
    =================== ======================================================
    None                a dash: no model was evaluated
    "undefined"         undefined: the metric has no value on this split
    a share in percent  with the digits that ``n`` draws support
    another number      with four significant digits
    =================== ======================================================
    """
    if isinstance(value, str):
        return value
    return percent(value, n) if metric.unit == PERCENT else _and_unit(plain(value, 4), metric)


def on_terminal(value: Value | None, metric: Metric, decimals: int = 1) -> str:
    """``value`` of ``metric`` with its unit, on a terminal; a share in percent has ``decimals`` after the point."""
    if value is None:
        return "not evaluated"
    if isinstance(value, str):
        return value
    if metric.unit == PERCENT:
        return f"{value:.{decimals}%}"
    return _and_unit(plain(value, 4) if math.isfinite(value) else str(value), metric)


def with_noise(text: str, metric: Metric, record: Mapping[str, Any]) -> str:
    """``text``, the value of ``metric`` in ``record``, with the half-width of its interval if it has noise.

    A record is a line of ``rounds.jsonl`` or a summary. The interval is of the noise alone, at 95 %.
    """
    half = record.get("intervals", {}).get(metric.name)
    if half is None:
        return text
    half *= metric.scale
    return f"{text} \u00b1 {half:.{decimals(half)}f} (noise)"


def speed(record: Mapping[str, Any], of_examples: str = "") -> str:
    """Clients per second and, if it is known, examples; a unit whose examples are not public has 0 of them."""
    examples = record["examples_per_second"]
    clients = f"{record['clients_per_second']:.3g} clients/s"
    return f"{clients}, {examples:.3g} examples/s{of_examples}" if examples else clients


def size(bytes: float) -> str:
    """``bytes`` as text, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if bytes < 1000:
            return f"{plain(bytes)} {unit}" if unit != "B" else f"{bytes:.0f} B"
        bytes /= 1000
    return f"{plain(bytes)} TB"


def duration(seconds: float) -> str:
    """``seconds`` as text, in s, min or h."""
    if seconds < 120:
        return f"{plain(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def with_unit(what: str, unit: str) -> str:
    """``what`` with its ``unit``, if it has one, for the head of a column and an axis."""
    return f"{what} ({unit})" if unit else what


def _and_unit(text: str, metric: Metric) -> str:
    return f"{text} {metric.unit}" if metric.unit and text != MISSING else text


def spread_out(indices: int, most: int) -> list[int]:
    """At most ``most`` of ``range(indices)``, evenly spaced, including the first and the last."""
    if indices <= most:
        return list(range(indices))
    return sorted({round(i * (indices - 1) / (most - 1)) for i in range(most)})
