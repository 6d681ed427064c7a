"""Figures of a comparison: curves with bands over seeds, the front of metric and epsilon, groups side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fed_dpsat.client import evaluation
from fed_dpsat.lab.report.canvas import HEIGHT, Drawing, draw
from fed_dpsat.lab.report.comparing import ALIKE, Comparison, Group
from fed_dpsat.lab.report.metric_axis import show_metric
from fed_dpsat.lab.report.palette import DASHES, INK, SERIES, Look, looks
from fed_dpsat.lab.report.training_figures import whole_numbers
from fed_dpsat.run.numbers import Estimate, estimate, plain, rounded
from fed_dpsat.tasks.metric import UNDEFINED, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HALF_WIDTH, FULL_WIDTH, ROW_WIDTH = 26, 60, 28
"""Characters of a label that fit into half the width of a figure, into the whole, and beside a row."""

MOST_CURVES, MOST_ROWS = len(SERIES), 40
TICK_GAP = 0.13
"""Least distance of two ticks as a share of an axis, so that their numbers do not collide."""

Scored = tuple[Group, Estimate]
"""A group with a finite mean of the metric."""

BAND = "Bands and bars are 95 % intervals of the mean over seeds (Student's t); a group of one seed has no interval."


def drawings(found: Comparison, folder: Path, prefix: str = "") -> Iterator[Drawing]:
    """All figures that the groups allow; their names begin with ``prefix``."""
    metric = found.metric
    scored = [(group, group.score) for group in found.groups if group.score and math.isfinite(group.score.mean)]
    if not scored:
        return
    shown = [group for group, _ in scored[:MOST_CURVES]]
    left_out = f" The best {len(shown)} of {len(found.groups)} groups." if len(found.groups) > len(shown) else ""
    styles = _looks(found)
    for kind in ("round", "epsilon"):
        curves = {group.label: mean_curve(group, metric, kind) for group in shown}
        curves = {label: curve for label, curve in curves.items() if curve}
        if not curves or (kind == "epsilon" and len(found.promises) > 1):
            continue
        yield draw(
            f"{prefix}{metric.slug}-against-{kind}",
            _curves(curves, metric, styles, "round" if kind == "round" else _epsilon_axis(found)),
            title=f"Test {metric.label} against {kind}",
            caption=f"Mean over seeds on {measured_on(found)}; {sizes(found)}; {guarantees(found)}. {BAND}{left_out}",
            alt=f"Lines with bands: test {metric.label} against {kind} of {len(curves)} groups; "
            f"{'highest' if metric.higher_is_better else 'lowest'} at the end: {found.groups[0].label}.",
            folder=folder,
            height=HEIGHT + _legend_height(list(curves)),
        )
    finite = [group for group, _ in scored if math.isfinite(group.epsilon)]
    epsilons = [group.epsilon for group in finite]
    if finite and max(epsilons) > (1 + ALIKE) * min(epsilons):
        yield draw(
            f"{prefix}{metric.slug}-and-epsilon",
            _front(found, scored),
            title=f"{metric.title} against epsilon",
            caption=f"Each dot is a group: {sizes(found)}, on {measured_on(found)}. Steps: the Pareto front of means "
            f"among groups with equal promises; it is not a test of significance. {BAND}"
            + (" Dashed: without privacy." if len(finite) < len(scored) else ""),
            alt=f"Dots: {metric.label} against epsilon of {len(finite)} groups; on the front: "
            + "; ".join(group.label for group in found.groups if group.on_front)
            + ".",
            folder=folder,
            height=HEIGHT + _legend_height(sorted({group.family for group in finite})),
        )
    rows = scored[:MOST_ROWS]
    yield draw(
        f"{prefix}groups",
        _rows(rows, metric, styles),
        title="Groups side by side",
        caption=f"Test {metric.label} after the last round on {measured_on(found)}; {sizes(found)}; "
        f"{guarantees(found)}. Small dots are single runs. {BAND}",
        alt="Dots with intervals: " + "; ".join(f"{g.label} {mean_text(score)}" for g, score in rows) + ".",
        folder=folder,
        height=max(HEIGHT, 0.8 + sum(_row_height(group) for group, _ in rows)),
    )


def mean_curve(group: Group, metric: Metric, kind: str) -> list[tuple[float, Estimate]]:
    """``(round or mean epsilon, metric in its unit)`` at the rounds that have a value in all runs of the group."""
    by_round = [{line["round"]: line for line in run.defined} for run in group.runs]
    common = sorted(set.intersection(*(set(lines) for lines in by_round)))
    found = []
    for round in common:
        score = estimate([metric.scale * lines[round][metric.key] for lines in by_round])
        at = float(round) if kind == "round" else estimate([lines[round]["epsilon"] for lines in by_round]).mean
        found.append((at, score))
    return found if all(math.isfinite(at) for at, _ in found) else []


def apart(values: Sequence[float]) -> list[float]:
    """Ticks of a logarithmic axis at positive ``values``, with two digits; none within ``TICK_GAP`` of the axis."""
    low, *others, high = sorted({float(f"{value:.2g}") for value in values})
    ticks, gap = [low], (high / low) ** TICK_GAP
    for value in others:
        if value >= gap * ticks[-1] and value * gap <= high:
            ticks.append(value)
    return [*ticks, high]


def mean_text(value: Estimate | None) -> str:
    """Mean with its interval, rounded to the digits that the interval supports."""
    if value is None:
        return plain(None)
    if math.isnan(value.half_width):
        return plain(value.mean)
    return f"{rounded(value.mean, value.half_width)} ± {rounded(value.half_width, value.half_width)}"


def score_text(group: Group) -> str:
    """The metric of a group as above; "undefined" if it has no value in a run."""
    return mean_text(group.score) if group.score else UNDEFINED


def sizes(found: Comparison) -> str:
    """The number of seeds, as text."""
    counts = sorted({len(group.runs) for group in found.groups})
    if counts == [1]:
        return "n = 1 seed each"
    return f"n = {counts[0]} seeds each" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]} seeds"


def guarantees(found: Comparison) -> str:
    """The range of epsilon, and delta, as text."""
    finite = [group.epsilon for group in found.groups if math.isfinite(group.epsilon)]
    if not finite:
        return "epsilon = ∞"
    deltas = sorted({group.promise.delta for group in found.groups if math.isfinite(group.epsilon)})
    spent = (
        plain(min(finite))
        if plain(min(finite)) == plain(max(finite))
        else f"{plain(min(finite))} to {plain(max(finite))}"
    )
    return f"epsilon = {spent} at delta = {', '.join(f'{delta:g}' for delta in deltas)}"


def measured_on(found: Comparison) -> str:
    """The test splits with their sizes, as text."""
    splits = {
        f"the {run.quality['measured_on'] if run.quality else evaluation.measured_on(run.config)}"
        + ("" if run.num_test is None else f" ({run.num_test:,} examples)")
        for group in found.groups
        for run in group.runs
    }
    return " and ".join(sorted(splits))


def _legend_below(axes: Axes) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None  # each axes has a figure
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if len(labels) > 1 and max(map(len, labels)) <= HALF_WIDTH else 1
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def _legend_height(labels: Sequence[str]) -> float:
    """Height of a legend below the figure, in inches."""
    lines = [len(_lines(label, FULL_WIDTH).splitlines()) for label in labels]
    return 0.1 + 0.17 * (sum(lines) if max(map(len, labels)) > HALF_WIDTH else (len(labels) + 1) // 2)


def _lines(label: str, width: int) -> str:
    """At most three lines of ``width`` characters."""
    return textwrap.fill(label, width, max_lines=3, placeholder=" ...")


def _row_height(group: Group) -> float:
    """Inches of the row of ``group``, whose label may have three lines."""
    return 0.12 + 0.14 * len(_lines(group.label, ROW_WIDTH).splitlines())


def _looks(found: Comparison) -> dict[str, Look]:
    """A look per group: one colour per family and one dash per budget; a single family gets a colour per group."""
    families = _family_looks(found.groups)
    if not 1 < len(families) <= len(SERIES):
        return looks([group.label for group in found.groups])
    shown: dict[str, Look] = {}
    for family, look in families.items():
        members = sorted((g for g in found.groups if g.family == family), key=lambda g: -g.epsilon)
        shown |= {g.label: replace(look, dash=DASHES[i % len(DASHES)]) for i, g in enumerate(members)}
    return shown


def _family_looks(groups: Sequence[Group]) -> dict[str, Look]:
    return looks(sorted({group.family for group in groups}))


def _epsilon_axis(found: Comparison) -> str:
    promise = next(iter(found.promises))
    return f"epsilon at delta = {promise.delta:g} (maximum over clients, {promise.accountant.upper()})"


def _curves(
    curves: dict[str, list[tuple[float, Estimate]]], metric: Metric, styles: dict[str, Look], x: str
) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for label, curve in curves.items():
            look, at = styles[label], [a for a, _ in curve]
            axes.plot(
                at, [e.mean for _, e in curve], color=look.colour.light, ls=look.dash, label=_lines(label, FULL_WIDTH)
            )
            if not math.isnan(curve[0][1].half_width):
                low, high = [e.low for _, e in curve], [e.high for _, e in curve]
                axes.fill_between(at, low, high, color=look.colour.light, alpha=0.18, lw=0)
        axes.set(xlabel=x)
        show_metric(axes, "y", metric, [e.mean for curve in curves.values() for _, e in curve], whole=True)
        if x == "round":
            whole_numbers(axes.xaxis)
        _legend_below(axes)

    return paint


def _front(found: Comparison, scored: Sequence[Scored]) -> Callable[[Axes], None]:
    finite = [(g, score) for g, score in scored if math.isfinite(g.epsilon)]
    styles = _family_looks(found.groups)
    styles = {family: look for family, look in styles.items() if any(g.family == family for g, _ in finite)}

    def paint(axes: Axes) -> None:
        for family, look in styles.items():
            members = sorted(((g, s) for g, s in finite if g.family == family), key=lambda pair: pair[0].epsilon)
            distinct = len({g.epsilon for g, _ in members}) == len(members)
            axes.errorbar(
                [g.epsilon for g, _ in members], [s.mean for _, s in members],
                yerr=[0.0 if math.isnan(s.half_width) else s.half_width for _, s in members],
                label=_lines(family, FULL_WIDTH),
                color=look.colour.light, marker=look.marker, ls=look.dash if distinct else "none", lw=1,
                markersize=5, capsize=2,
            )  # fmt: skip
        for kind in {(g.promise, g.measured_on) for g, _ in finite}:
            front = [(g.epsilon, s.mean) for g, s in finite if g.on_front and (g.promise, g.measured_on) == kind]
            front.sort()
            axes.step([e for e, _ in front], [m for _, m in front], where="post", color=INK.light, lw=0.8)
        for group, score in scored:
            if math.isinf(group.epsilon):
                axes.axhline(score.mean, color=INK.light, lw=1, ls=(0, (4, 3)))
        epsilons = [g.epsilon for g, _ in finite]
        if min(epsilons) > 0 and max(epsilons) / min(epsilons) >= 4:
            axes.set_xscale("log")
            ticks = apart(epsilons)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        delta = " or ".join(sorted({f"{promise.delta:g}" for promise in found.promises}))
        axes.set(xlabel=f"epsilon at delta = {delta}")
        show_metric(axes, "y", found.metric, [s.mean for _, s in scored], whole=False)
        _legend_below(axes)

    return paint


def _rows(scored: Sequence[Scored], metric: Metric, styles: dict[str, Look]) -> Callable[[Axes], None]:
    singles = {g.label: [metric.scale * run.score for run in g.runs if isinstance(run.score, float)] for g, _ in scored}

    def paint(axes: Axes) -> None:
        heights = [_row_height(group) for group, _ in scored]
        places = [-sum(heights[:i]) - height / 2 for i, height in enumerate(heights)]
        for y, (group, score) in zip(places, scored, strict=True):
            colour = styles[group.label].colour.light
            if not math.isnan(score.half_width):
                axes.hlines(y, score.low, score.high, color=colour, lw=2.5, alpha=0.5)
            single = singles[group.label]
            axes.plot(single, [y] * len(single), ".", color=colour, markersize=2.5, alpha=0.7)
            axes.plot([score.mean], [y], "o", color=colour, markersize=5)
        axes.set_yticks(places, [_lines(group.label, ROW_WIDTH) for group, _ in scored], fontsize=8)
        axes.set(ylim=(-sum(heights), 0))
        show_metric(axes, "x", metric, [value for values in singles.values() for value in values], whole=False)

    return paint
