"""Figures of the last model and of the clients: calibration, classes, accuracy by client, partition, clip norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.client.evaluation import ClassAccuracy, client_accuracies, gini, measured_on, worst_decile
from fed_dpsat.lab.report.canvas import HEIGHT, Drawing, Table, draw, thinned
from fed_dpsat.lab.report.palette import BLUE, GREEN, INK, MUTED, ORANGE, VERMILLION
from fed_dpsat.lab.report.training_figures import guarantee, whole_numbers
from fed_dpsat.run.numbers import percent, plain, wilson
from fed_dpsat.run.result import Run
from fed_dpsat.run.state_file import ARRAYS, SUFFIX, read_state

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

FEW_CLASSES, FEW_CLIENTS, SHADES = 20, 30, 24
ONLY_HERE = "Private information: only a simulation has it; a deployment does not."


def reliability_diagram(run: Run, folder: Path) -> Drawing | None:
    """Accuracy against confidence, in bins, with four scores; None without bins."""
    quality = run.quality
    if quality is None or "bins" not in quality:
        return None
    bins = [b for b in quality["bins"] if b["count"]]
    scores = {"ECE": quality["ece"], "MCE": quality["mce"], "Brier": quality["brier"], "NLL": quality["nll"]}
    words = ", ".join(f"{name} {plain(value)}" for name, value in scores.items())

    def paint(axes: Axes) -> None:
        width = bins[0]["high"] - bins[0]["low"]
        at = [b["low"] + width / 2 for b in bins]
        accuracy, confidence = [b["accuracy"] for b in bins], [b["confidence"] for b in bins]
        axes.bar(at, accuracy, width=0.94 * width, color=BLUE.light, alpha=0.75)
        bounds = np.array([wilson(b["accuracy"], b["count"]) for b in bins]).T
        axes.vlines(at, bounds[0], bounds[1], color=INK.light, lw=1)
        axes.plot(confidence, confidence, "o", color=VERMILLION.light)
        axes.plot([0, 1], [0, 1], color=MUTED.light, lw=1, ls=(0, (4, 3)))
        axes.set(xlabel="confidence of the prediction", ylabel="share that is correct", xlim=(0, 1), ylim=(0, 1.02))

    rows = tuple(
        (f"{b['low']:.2f} to {b['high']:.2f}", str(b["count"]), f"{b['confidence']:.3f}", f"{b['accuracy']:.3f}")
        for b in bins
    )
    lost: int = quality["num_nonfinite"]
    return draw(
        "reliability",
        paint if bins else _nothing,
        title="Calibration",
        subtitle=words,
        caption=f"Reliability diagram on the {quality['measured_on']}, n = {quality['num_examples']:,} examples, after "
        f"round {quality['round']}; {guarantee(run)}. {len(quality['bins'])} bins of equal width. Bars: share "
        "that is correct, with 95 % intervals (Wilson); dots: mean confidence; dashed: perfect calibration. ECE and "
        "MCE: mean and largest gap over bins (Guo et al. 2017); Brier: 0 to 2; NLL in nats."
        + (f" {lost} outputs were not finite, so the scores have no value." if lost else ""),
        alt=f"Bars: share of correct predictions by confidence. {words}.",
        folder=folder,
        table=Table(head=("confidence", "examples", "mean confidence", "accuracy"), rows=rows),
    )


def class_accuracy(run: Run, folder: Path) -> Drawing | None:
    """Accuracy by class with its interval, sorted; without names for many classes. None without predicted classes."""
    quality = run.quality
    if quality is None or "per_class" not in quality:
        return None
    names = quality["class_names"]
    classes = [(name, c) for name, c in zip(names, quality["per_class"], strict=True) if c["count"]]
    ordered = sorted(classes, key=lambda item: item[1]["accuracy"])
    bounds = np.array([wilson(c["accuracy"], c["count"]) for _, c in ordered]).T
    values = [c["accuracy"] for _, c in ordered]
    few = len(ordered) <= FEW_CLASSES

    def paint(axes: Axes) -> None:
        at = np.arange(len(ordered))
        axes.hlines(at, 100 * bounds[0], 100 * bounds[1], color=GREEN.light, lw=2.5, alpha=0.45)
        axes.plot([100 * v for v in values], at, "o", color=GREEN.light, ls="none")
        axes.axvline(100 * quality["accuracy"], color=INK.light, lw=1, ls=(0, (4, 3)))
        axes.set_yticks(at if few else [], [str(name) for name, _ in ordered] if few else [])
        axes.set(xlabel="test accuracy (%)", ylabel="class" if few else "classes, sorted", xlim=(0, 101))

    rows = [(str(name), str(c["count"]), percent(c["accuracy"], c["count"])) for name, c in ordered]
    return draw(
        "class-accuracy",
        paint,
        title="Accuracy by class",
        caption=f"On the {quality['measured_on']}, n = {quality['num_examples']:,} examples, with 95 % intervals "
        f"(Wilson); dashed: all classes; {guarantee(run)}. Worst class: {ordered[0][0]}, "
        f"{percent(values[0], ordered[0][1]['count'])} of {ordered[0][1]['count']}.",
        alt=f"Dots: accuracy of {len(ordered)} classes, from {percent(values[0])} to {percent(values[-1])}.",
        folder=folder,
        table=thinned(("class", "test examples", "accuracy"), rows, "quality.json", most=FEW_CLASSES),
        height=max(HEIGHT, 0.17 * len(ordered)) if few else HEIGHT,
    )


def client_accuracy(run: Run, folder: Path) -> Drawing | None:
    """Accuracy of the global model on the label distribution of each client; only in a simulation."""
    values = accuracy_by_client(run)
    if values is None:
        return None
    known = np.sort(values[np.isfinite(values)])
    if not len(known):
        return None
    worst, inequality = worst_decile(known), gini(known)

    def paint(axes: Axes) -> None:
        bins = int(min(30, max(5, math.sqrt(len(known)) * 2)))
        low, high = float(known[0]), float(known[-1])
        span = max(high - low, 0.02)
        within = 100 * (low - span / 10), 100 * (high + span / 10)
        axes.hist(100 * known, bins=bins, range=within, color=ORANGE.light)
        axes.axvline(100 * float(known.mean()), color=INK.light, lw=1.2, label="mean")
        axes.axvline(100 * worst, color=VERMILLION.light, lw=1.2, ls=(0, (4, 3)), label="worst tenth")
        axes.set(xlabel="test accuracy on the client's mix of labels (%)", ylabel="clients")
        whole_numbers(axes.yaxis)
        axes.legend(loc="best")

    return draw(
        "client-accuracy",
        paint,
        title="Accuracy by client",
        caption=f"Accuracy of a client: mean of the accuracies by class on the {measured_on(run.config)}, weighted by "
        f"its label counts. n = {len(known):,} clients; mean {percent(float(known.mean()))}, worst tenth "
        f"{percent(worst)}, Gini {plain(inequality, 2)} (0 is equal); {guarantee(run)}. {ONLY_HERE}",
        alt=f"Histogram: accuracy of {len(known)} clients, {percent(float(known[0]))} to {percent(float(known[-1]))}.",
        folder=folder,
        table=Table(
            head=("clients", "mean", "worst tenth", "Gini", "lowest", "highest"),
            rows=(
                (
                    f"{len(known):,}", percent(float(known.mean())), percent(worst), plain(inequality, 2),
                    percent(float(known[0])), percent(float(known[-1])),
                ),
            ),
        ),
        private=True,
    )  # fmt: skip


def accuracy_by_client(run: Run) -> NDArray[np.float64] | None:
    """``[clients]``, or None without label counts or accuracies by class."""
    counts = (run.simulation or {}).get("label_counts")
    if run.quality is None or "per_class" not in run.quality or counts is None:
        return None
    return client_accuracies(np.array(counts), [ClassAccuracy(**c) for c in run.quality["per_class"]])


def partition(run: Run, folder: Path) -> Iterator[Drawing]:
    """Number of examples of each client and, in a simulation, its label counts."""
    held = run.simulation
    if held is None:
        return
    sizes = np.array(held["sizes"])
    of, what = ("Persons", "persons") if run.config.privacy_unit == "user" else ("Examples", "training examples")
    how = f"{run.config.partition} partition, {len(sizes):,} clients, {sizes.sum():,} {what}"

    def paint_sizes(axes: Axes) -> None:
        if len(sizes) <= FEW_CLIENTS:
            axes.bar(np.arange(len(sizes)), sizes, color=BLUE.light)
            whole_numbers(axes.xaxis)
            axes.set(xlabel="client", ylabel=of.lower())
        else:
            spread = int(sizes.max() - sizes.min()) + 1
            within = float(sizes.min()) - 0.5, float(sizes.max()) + 0.5
            axes.hist(sizes, bins=min(30, spread), range=within, color=BLUE.light)
            whole_numbers(axes.xaxis)
            axes.set(xlabel=f"{of.lower()} of a client", ylabel="clients")
        axes.grid(axis="x", visible=False)

    middle = int(np.median(sizes))
    public = run.config.privacy_unit != "client"
    yield draw(
        "client-sizes",
        paint_sizes,
        title=f"{of} of each client",
        caption=f"{how}. Smallest {sizes.min():,}, median {middle:,}, largest {sizes.max():,}; "
        f"Gini {plain(gini(sizes), 2)}. {'Sizes are declared public.' if public else ONLY_HERE}",
        alt=f"Bars: examples per client, from {sizes.min():,} to {sizes.max():,}.",
        folder=folder,
        table=thinned(
            ("client", "examples"), [(str(i), f"{n:,}") for i, n in enumerate(sizes.tolist())], "simulation.json"
        ),
        private=not public,
    )
    if held["label_counts"] is None:
        return
    counts = np.array(held["label_counts"])
    shares = counts / counts.sum(1, keepdims=True)
    names = (
        [str(name) for name in run.quality["class_names"]] if run.quality else [str(k) for k in range(counts.shape[1])]
    )
    heat = len(sizes) <= FEW_CLIENTS and len(names) <= FEW_CLASSES

    def paint_labels(axes: Axes) -> None:
        if heat:
            for client, row in enumerate(shares):
                for label, share in enumerate(row):
                    axes.add_patch(_cell(client - 0.5, label - 0.5, 1, float(share / shares.max())))
            axes.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-0.5, len(names) - 0.5), xlabel="client", ylabel="class")
            axes.set_yticks(range(len(names)), names)
            whole_numbers(axes.xaxis)
            axes.grid(visible=False)
            _scale(axes, 100 * float(shares.max()))
        else:
            axes.hist(100 * shares.max(1), bins=np.linspace(0, 100, 26).tolist(), color=ORANGE.light)
            axes.set(xlabel="share of a client's most frequent class (%)", ylabel="clients", xlim=(0, 100))

    most = shares.max(1)
    yield draw(
        "client-labels",
        paint_labels,
        title="Labels of each client",
        caption=f"{how}. The most frequent class of a client is {percent(float(np.median(most)))} of its examples in "
        f"the median, {percent(float(most.max()))} at most. {ONLY_HERE}",
        alt=f"Share of each class in each client; the most frequent has {percent(float(np.median(most)))}, median.",
        folder=folder,
        table=Table(
            head=("client", *names), rows=tuple((str(c), *map(str, row)) for c, row in enumerate(counts.tolist()))
        )
        if heat
        else None,
        private=True,
        height=max(HEIGHT, 0.17 * len(names)) if heat else HEIGHT,
    )


def clip_norms(run: Run, folder: Path) -> Drawing | None:
    """The last bound of adaptive clipping by client; None for other rules."""
    if run.config.clipping != "adaptive":
        return None
    found = read_clip_norms(run)
    if not found:
        return None
    values = np.array(list(found.values()))

    def paint(axes: Axes) -> None:
        axes.hist(values, bins=min(30, max(5, len(values))), color=GREEN.light)
        axes.axvline(run.config.clip_norm, color=INK.light, lw=1.2, ls=(0, (4, 3)), label="at the start")
        axes.set(xlabel="clip norm", ylabel="clients")
        axes.legend(loc="best")

    return draw(
        "clip-norms",
        paint,
        title="Clip norms of adaptive clipping",
        caption=f"Clip norm of {len(values):,} clients after their last round: a function of noised counts, which "
        "epsilon covers. It stays on the client; a server does not see it. The target is a share of "
        f"{run.config.clip_quantile:g} of the gradient norms below it.",
        alt=f"Histogram: clip norms from {plain(float(values.min()))} to {plain(float(values.max()))}.",
        folder=folder,
        table=thinned(("client", "clip norm"), [(str(c), plain(v)) for c, v in sorted(found.items())], "state/"),
    )


def read_clip_norms(run: Run) -> Mapping[int, float]:
    """The clip norm of each client that has one, from the stored states of a simulation."""
    newest: dict[int, Path] = {}
    for path in (run.path / "state").glob(f"*/*{SUFFIX}"):
        client = int(path.parent.name)
        if client not in newest or int(path.stem) > int(newest[client].stem):
            newest[client] = path
    found: dict[int, float] = {}
    for client, path in sorted(newest.items()):
        for kind, items in read_state(path).values():
            if kind == ARRAYS and "clipping/clip_norm" in items:
                found[client] = float(items["clipping/clip_norm"])
    return found


def _cell(left: float, bottom: float, height: float, strength: float) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), 1, height, facecolor=BLUE.light, alpha=strength, edgecolor="none")


def _scale(axes: Axes, most: float) -> None:
    """The colours from 0 to ``most`` percent, right of ``axes``."""
    scale = axes.inset_axes((1.03, 0, 0.04, 1))
    for step in range(SHADES):
        scale.add_patch(_cell(0, most * step / SHADES, most / SHADES, (step + 0.5) / SHADES))
    scale.set(xlim=(0, 1), ylim=(0, most), xticks=[], ylabel="share of the client's examples (%)")
    scale.yaxis.tick_right()
    scale.yaxis.set_label_position("right")
    scale.grid(visible=False)


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no finite output", ha="center", color=INK.light)
