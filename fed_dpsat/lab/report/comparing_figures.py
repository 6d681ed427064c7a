"""Figures of a comparison: curves with bands over seeds, the front of accuracy against epsilon, groups side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fed_dpsat.client import evaluation
from fed_dpsat.lab.report.canvas import HEIGHT, Drawing, draw
from fed_dpsat.lab.report.comparing import Comparison, Group
from fed_dpsat.lab.report.numbers import Estimate, estimate, plain, rounded
from fed_dpsat.lab.report.palette import DASHES, INK, SERIES, Look, looks
from fed_dpsat.lab.report.training_figures import whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HALF_WIDTH, FULL_WIDTH = 26, 60
"""Characters of a label that fit into half the width of a figure, and into the whole."""

MOST_CURVES, MOST_ROWS = len(SERIES), 40
BAND = "Bands and bars are 95 % intervals of the mean over seeds (Student's t); a group of one seed has no interval."


def drawings(found: Comparison, folder: Path, prefix: str = "") -> Iterator[Drawing]:
    """All figures that the groups allow; their names begin with ``prefix``."""
    shown = found.groups[:MOST_CURVES]
    left_out = f" The best {len(shown)} of {len(found.groups)} groups." if len(found.groups) > len(shown) else ""
    styles = _looks(found)
    for kind in ("round", "epsilon"):
        curves = {group.label: mean_curve(group, kind) for group in shown}
        curves = {label: curve for label, curve in curves.items() if curve}
        if not curves or (kind == "epsilon" and len(found.promises) > 1):
            continue
        yield draw(
            f"{prefix}accuracy-against-{kind}",
            _curves(curves, styles, "round" if kind == "round" else _epsilon_axis(found)),
            title=f"Test accuracy against {kind}",
            caption=f"Mean over seeds on {measured_on(found)}; {sizes(found)}; {guarantees(found)}. {BAND}{left_out}",
            alt=f"Lines with bands: test accuracy against {kind} of {len(curves)} groups; highest at the end: "
            f"{found.groups[0].label}.",
            folder=folder,
            height=HEIGHT + _legend_height(list(curves)),
        )
    finite = [group for group in found.groups if math.isfinite(group.epsilon)]
    if len({group.epsilon for group in finite}) > 1:
        yield draw(
            f"{prefix}accuracy-and-epsilon",
            _front(found, finite),
            title="Accuracy against epsilon",
            caption=f"Each dot is a group: {sizes(found)}, on {measured_on(found)}. Steps: the Pareto front of means "
            f"among groups with equal promises; it is not a test of significance. {BAND}"
            + (" Dashed: without privacy." if len(finite) < len(found.groups) else ""),
            alt=f"Dots: accuracy against epsilon of {len(finite)} groups; on the front: "
            + "; ".join(group.label for group in found.groups if group.on_front)
            + ".",
            folder=folder,
            height=HEIGHT + _legend_height(sorted({group.family for group in finite})),
        )
    rows = found.groups[:MOST_ROWS]
    yield draw(
        f"{prefix}groups",
        _rows(rows, styles),
        title="Groups side by side",
        caption=f"Test accuracy after the last round on {measured_on(found)}; {sizes(found)}; {guarantees(found)}. "
        f"Small dots are single runs. {BAND}",
        alt="Dots with intervals: " + "; ".join(f"{g.label} {mean_text(g.accuracy)}" for g in rows) + ".",
        folder=folder,
        height=max(HEIGHT, 0.8 + sum(0.12 + 0.14 * len(_lines(group.label, 28).splitlines()) for group in rows)),
    )


def mean_curve(group: Group, kind: str) -> list[tuple[float, Estimate]]:
    """``(round or mean epsilon, accuracy)`` at the rounds with an evaluation in all runs of the group."""
    by_round = [{line["round"]: line for line in run.evaluated} for run in group.runs]
    common = sorted(set.intersection(*(set(lines) for lines in by_round)))
    found = []
    for round in common:
        accuracy = estimate([100 * lines[round]["test_accuracy"] for lines in by_round])
        at = float(round) if kind == "round" else estimate([lines[round]["epsilon"] for lines in by_round]).mean
        found.append((at, accuracy))
    return found if all(math.isfinite(at) for at, _ in found) else []


def mean_text(value: Estimate | None) -> str:
    """Mean with its interval, rounded to the digits that the interval supports."""
    if value is None:
        return plain(None)
    if math.isnan(value.half_width):
        return plain(value.mean)
    return f"{rounded(value.mean, value.half_width)} ± {rounded(value.half_width, value.half_width)}"


def sizes(found: Comparison) -> str:
    """The number of seeds, as text."""
    counts = sorted({group.accuracy.n for group in found.groups})
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
        f"the {run.quality['measured_on']} ({run.quality['num_examples']:,} examples)"
        if run.quality
        else f"the {evaluation.measured_on(run.config)}"
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
    return textwrap.fill(textwrap.shorten(label, 3 * width - 6, placeholder=" ..."), width)


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


def _curves(curves: dict[str, list[tuple[float, Estimate]]], styles: dict[str, Look], x: str) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for label, curve in curves.items():
            look, at = styles[label], [a for a, _ in curve]
            axes.plot(
                at, [e.mean for _, e in curve], color=look.colour.light, ls=look.dash, label=_lines(label, FULL_WIDTH)
            )
            if not math.isnan(curve[0][1].half_width):
                low, high = [e.low for _, e in curve], [e.high for _, e in curve]
                axes.fill_between(at, low, high, color=look.colour.light, alpha=0.18, lw=0)
        axes.set(xlabel=x, ylabel="test accuracy (%)", ylim=(0, 100))
        if x == "round":
            whole_numbers(axes.xaxis)
        _legend_below(axes)

    return paint


def _front(found: Comparison, finite: Sequence[Group]) -> Callable[[Axes], None]:
    styles = _family_looks(found.groups)
    styles = {family: look for family, look in styles.items() if any(group.family == family for group in finite)}

    def paint(axes: Axes) -> None:
        for family, look in styles.items():
            members = sorted((g for g in finite if g.family == family), key=lambda g: g.epsilon)
            distinct = len({g.epsilon for g in members}) == len(members)
            bars = [0.0 if math.isnan(g.accuracy.half_width) else g.accuracy.half_width for g in members]
            axes.errorbar(
                [g.epsilon for g in members], [g.accuracy.mean for g in members], yerr=bars,
                label=_lines(family, FULL_WIDTH),
                color=look.colour.light, marker=look.marker, ls=look.dash if distinct else "none", lw=1,
                markersize=5, capsize=2,
            )  # fmt: skip
        for kind in {(g.promise, g.measured_on) for g in finite}:
            front = [g for g in finite if g.on_front and (g.promise, g.measured_on) == kind]
            front.sort(key=lambda g: g.epsilon)
            steps = [g.epsilon for g in front], [g.accuracy.mean for g in front]
            axes.step(*steps, where="post", color=INK.light, lw=0.8)
        for group in found.groups:
            if math.isinf(group.epsilon):
                axes.axhline(group.accuracy.mean, color=INK.light, lw=1, ls=(0, (4, 3)))
        epsilons = [g.epsilon for g in finite]
        if min(epsilons) > 0 and max(epsilons) / min(epsilons) >= 4:
            axes.set_xscale("log")
            ticks = sorted({float(f"{e:.2g}") for e in epsilons})
            axes.set_xticks(ticks if len(ticks) <= 6 else [ticks[0], ticks[-1]], labels=None)
            axes.set_xticklabels([f"{t:g}" for t in (ticks if len(ticks) <= 6 else [ticks[0], ticks[-1]])])
            axes.minorticks_off()
        delta = " or ".join(sorted({f"{promise.delta:g}" for promise in found.promises}))
        axes.set(xlabel=f"epsilon at delta = {delta}", ylabel="test accuracy (%)")
        _legend_below(axes)

    return paint


def _rows(groups: Sequence[Group], styles: dict[str, Look]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for y, group in enumerate(reversed(groups)):
            colour = styles[group.label].colour.light
            if not math.isnan(group.accuracy.half_width):
                axes.hlines(y, group.accuracy.low, group.accuracy.high, color=colour, lw=2.5, alpha=0.5)
            single = [100 * run.accuracy for run in group.runs if run.accuracy is not None]
            axes.plot(single, [y] * len(single), ".", color=colour, markersize=2.5, alpha=0.7)
            axes.plot([group.accuracy.mean], [y], "o", color=colour, markersize=5)
        axes.set_yticks(range(len(groups)), [_lines(group.label, 28) for group in reversed(groups)], fontsize=8)
        axes.set(xlabel="test accuracy (%)", ylim=(-0.6, len(groups) - 0.4))

    return paint
