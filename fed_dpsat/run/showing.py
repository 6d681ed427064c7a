"""A run in a few lines of text, and in a notebook as a table and a curve."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from fed_dpsat.run.curve import curve_svg
from fed_dpsat.run.metric import number_of
from fed_dpsat.run.numbers import decimals, in_unit, plain, wilson, with_noise

if TYPE_CHECKING:
    from fed_dpsat.run.result import Run


def as_text(run: Run) -> str:
    """The rows below the folder, for a terminal."""
    found = rows(run)
    width = max(len(name) for name, _ in found)
    return "\n".join([f"Run in {run.path}", *(f"  {name:{width}}  {text}" for name, text in found)])


def as_html(run: Run) -> str:
    """The rows and the curve, for a notebook."""
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(text)}</td></tr>'
        for name, text in [*rows(run), ("folder", str(run.path))]
    )
    return f"<table>{cells}</table>{picture(run)}"


def picture(run: Run) -> str:
    """The main metric against rounds as SVG; empty before a round with a value."""
    metric = run.metric
    values = [(float(line["round"]), metric.scale * number_of(line[metric.key])) for line in run.rounds]
    points = [point for point in values if math.isfinite(point[1])]
    return curve_svg(points, x="round", y=f"{_split(run)} {metric.heading}") if points else ""


def rows(run: Run) -> list[tuple[str, str]]:
    """Metric, epsilon, noise and rounds of ``run`` as pairs of a name and a text."""
    done = run.rounds[-1]["round"] if run.rounds else 0
    early = f"; it ended early: {run.summary['ended_early']}" if run.summary.get("ended_early") else ""
    return [
        (f"{_split(run)} {run.metric.directed}", _score(run)),
        ("epsilon", _epsilon(run)),
        *([("noise", run.summary["noise"])] if run.config.private and "noise" in run.summary else []),
        ("rounds", f"{done} of {run.config.num_rounds}, {run.status}{early}"),
    ]


def _split(run: Run) -> str:
    return run.config.evaluated_on


def _score(run: Run) -> str:
    if run.score is None:
        return "not evaluated"
    found, n = in_unit(run.score, run.metric, run.num_draws), run.num_draws
    if not n or not isinstance(run.score, float):
        return with_noise(found, run.metric, run.summary)
    low, high = wilson(run.score, n)
    digits = decimals(100 * (high - low) / 2)
    return f"{found}, 95 % interval {100 * low:.{digits}f} to {100 * high:.{digits}f} % ({n:,} examples)"


def _epsilon(run: Run) -> str:
    if not run.config.private:
        return "∞, without noise"
    if math.isnan(run.epsilon):
        return "unknown: there is no ledger"
    return f"{plain(run.epsilon, 4)} at delta {run.config.delta:g} ({run.config.accountant.upper()})"
