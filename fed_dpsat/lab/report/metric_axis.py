"""The axis of a metric: its label, its limits, and a logarithmic scale for values that span a decade."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fed_dpsat.run.numbers import plain
from fed_dpsat.tasks.metric import PERCENT, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECADE = 10
FEW_DECADES = 2
"""With more of them, the ticks are powers of ten alone."""


def show_metric(axes: Axes, which: Literal["x", "y"], metric: Metric, values: Sequence[float], *, whole: bool) -> None:
    """Label and scale the axis ``which`` of ``axes`` for ``values`` of ``metric``, in the unit that readers see.

    ======================================= ===================================================================
    values                                  axis
    ======================================= ===================================================================
    shares in percent                       linear; 0 to 100 if ``whole``, else within them, also if an interval is not
    all positive, smaller is better, and    logarithmic, because errors and perplexities of untrained models
    the largest 10 times the smallest       would hide the differences of good ones
    others                                  linear; from 0 if ``whole`` and none is negative
    ======================================= ===================================================================
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text(f"test {metric.heading}")
    finite = [value for value in values if math.isfinite(value)]
    if metric.unit != PERCENT and is_wide(metric, finite):
        _logarithmic(axes, which, max(finite) / min(finite))
    elif whole and finite and min(finite) >= 0:
        top = axes.get_xlim()[1] if which == "x" else axes.get_ylim()[1]
        axes.set(**{f"{which}lim": (0, 100 if metric.unit == PERCENT else max(top, 1.05 * max(finite)))})
    elif metric.unit == PERCENT:
        low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
        axes.set(**{f"{which}lim": (max(low, -1), min(high, 101))})  # a dot at the end is whole


def is_wide(metric: Metric, finite: Sequence[float]) -> bool:
    """Whether ``finite`` values of ``metric``, of which smaller ones are better, are positive and span a decade."""
    return not metric.higher_is_better and bool(finite) and 0 < DECADE * min(finite) <= max(finite)


def _logarithmic(axes: Axes, which: Literal["x", "y"], ratio: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 10**FEW_DECADES else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value, 1)))
    axis.set_minor_locator(NullLocator())
