"""Figures of a run over time: quality against rounds and epsilon, spending, signal and noise, time, bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fed_dpsat.client.evaluation import measured_on
from fed_dpsat.lab.report.canvas import Drawing, Table, draw, thinned
from fed_dpsat.lab.report.metric_axis import show_metric
from fed_dpsat.lab.report.palette import BLUE, GREEN, INK, VERMILLION, Colour, looks
from fed_dpsat.lab.report.spending import Spending
from fed_dpsat.run.metric import LOSS, loss_unit, number_of, other_metrics, value_of
from fed_dpsat.run.numbers import duration, in_unit, plain, size, with_noise, with_unit
from fed_dpsat.run.result import Run
from fed_dpsat.tasks.metric import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

FEW_CURVES = 6
ROUNDS_FILE = "rounds.jsonl"
UNITS = ((1e9, "gigabytes"), (1e6, "megabytes"), (1e3, "kilobytes"), (1, "bytes"))


def quality_curves(run: Run, folder: Path) -> Iterator[Drawing]:
    """The main metric and the loss of the global model, against rounds and, if finite, against epsilon."""
    lines = run.evaluated
    if not lines:
        return
    metric, of_loss = run.metric, loss_unit(run.task)
    others = other_metrics(lines[0], metric, run.task)
    rows = [
        (
            str(line["round"]),
            plain(line["epsilon"]),
            with_noise(in_unit(value_of(line[metric.key]), metric, run.num_draws), metric, line),
            *(with_noise(in_unit(value_of(line[other.key]), other), other, line) for other in others),
            with_noise(plain(line["test_loss"]), LOSS, line),
        )
        for line in lines
    ]
    head = ("round", "epsilon", *(shown.directed for shown in (metric, *others)), with_unit("loss", of_loss))
    table = thinned(head, rows, ROUNDS_FILE)
    against = {"round": [float(line["round"]) for line in lines]}
    if all(math.isfinite(line["epsilon"]) for line in lines):
        against["epsilon"] = [line["epsilon"] for line in lines]
    colour = looks([run.method])[run.method].colour
    for shown, unit in {metric: metric.unit, LOSS: of_loss}.items():
        values = [shown.scale * number_of(line[shown.key]) for line in lines]
        if not any(map(math.isfinite, values)):
            continue
        ends = f"from {plain(values[0])} to {plain(values[-1])} {unit}".strip()
        for kind, at in against.items():
            yield draw(
                f"{shown.slug}-against-{kind}",
                _curve(at, values, colour, axis(run, kind), shown, unit),
                title=f"Test {shown.label} against {kind}",
                caption=f"{shown.title} of the global model on {test_split(run)}; {guarantee(run)}; n = 1 run.",
                alt=f"Line: test {shown.label} against {kind}, {ends}.",
                folder=folder,
                table=table if kind == "round" and shown == metric else None,
            )


def _curve(
    at: list[float], values: list[float], colour: Colour, x: str, shown: Metric, unit: str
) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        axes.plot(at, values, color=colour.light, marker="o" if len(at) <= 15 else "")
        axes.set(xlabel=x)
        if shown == LOSS and unit:
            axes.set(ylabel=f"test {with_unit('loss', unit)}", ylim=(0, None))
        else:
            show_metric(axes, "y", shown, values, whole=True)
        if x == "round":
            whole_numbers(axes.xaxis)

    return paint


def spending_curves(run: Run, spending: Spending, folder: Path) -> Drawing | None:
    """Epsilon and budget of each client over rounds; a few distinct curves, else quantiles."""
    if not np.isfinite(spending.epsilon).all():
        return None
    curves = Counter(map(tuple, spending.epsilon.T.tolist()))
    finite = sorted({float(b) for b in spending.budgets if math.isfinite(b)})
    few = len(curves) <= FEW_CURVES
    quantiles = np.quantile(spending.epsilon, (0, 0.1, 0.5, 0.9, 1), axis=1)

    def paint(axes: Axes) -> None:
        rounds = spending.rounds
        if few:
            ordered = sorted(curves.items(), key=lambda item: -item[0][-1])
            styles = looks([_clients(n) + f", {i}" for i, (_, n) in enumerate(ordered)]).values()
            for (curve, n), look in zip(ordered, styles, strict=True):
                axes.plot(rounds, curve, color=look.colour.light, linestyle=look.dash, label=_clients(n))
        else:
            axes.fill_between(rounds, quantiles[0], quantiles[4], color=BLUE.light, alpha=0.15, label="all", lw=0)
            axes.fill_between(rounds, quantiles[1], quantiles[3], color=BLUE.light, alpha=0.3, label="80 %", lw=0)
            axes.plot(rounds, quantiles[2], color=BLUE.light, label="median client")
        for i, budget in enumerate(finite if len(finite) <= FEW_CURVES else (finite[0], finite[-1])):
            axes.axhline(budget, color=INK.light, ls=(0, (4, 3)), lw=1, label="budget" if i == 0 else None)
        axes.set(xlabel="round", ylabel=f"epsilon at delta = {run.config.delta:g}", ylim=(0, None))
        axes.legend(loc="best")
        whole_numbers(axes.xaxis)

    rows = [
        (str(r), *(plain(float(q)) for q in quantiles[:, i][[0, 2, 4]])) for i, r in enumerate(spending.rounds.tolist())
    ]
    budgets = "no budget" if not finite else f"budget {finite[0]:g}" + (f" to {finite[-1]:g}" if finite[1:] else "")
    return draw(
        "epsilon-per-client",
        paint,
        title="Epsilon of each client",
        caption=f"The charges of each of {run.config.num_clients:,} clients ({budgets}) in the ledger, with or "
        f"without a valid reply, by {run.config.accountant.upper()}. Equal curves are one line. The epsilon of the "
        "federation is the highest.",
        alt=f"Lines: epsilon of clients over {spending.rounds[-1]} rounds, up to {plain(float(quantiles[4, -1]))}.",
        folder=folder,
        table=thinned(("round", "lowest", "median", "highest"), rows, "ledger.sqlite (fed-dpsat ledger)"),
    )


def signal_and_noise(run: Run, folder: Path) -> Drawing | None:
    """The norm of the change of the global model per round, and the expected norm of its noise."""
    lines = [line for line in run.rounds if line.get("update_norm") is not None]
    if not lines:
        return None
    rounds = [line["round"] for line in lines]
    known = all(line["noise_norm"] is not None for line in lines) and run.config.private
    rows = [
        (str(line["round"]), plain(line["update_norm"]), plain(line["noise_norm"]), plain(signal_to_noise(line)))
        for line in lines
    ]

    def paint(axes: Axes) -> None:
        marker = "o" if len(rounds) <= 30 else ""
        axes.plot(rounds, [line["update_norm"] for line in lines], color=BLUE.light, marker=marker, label="update")
        if known:
            noise = [line["noise_norm"] for line in lines]
            axes.plot(rounds, noise, color=VERMILLION.light, ls=(0, (5, 2)), label="noise alone, expected")
        top = max(max(line["update_norm"], line["noise_norm"] or 0.0) for line in lines)
        axes.set(xlabel="round", ylabel="Euclidean norm", ylim=(0, 1.08 * top if 0 < top < math.inf else None))
        whole_numbers(axes.xaxis)
        axes.legend(loc="best")

    if known:
        ratios = [signal_to_noise(line) for line in lines]
        middle = f"Signal to noise, median over rounds: {plain(float(np.median(ratios)), 2)}."
        of_clients = "in the mean of the clients' updates, computed from events, learning rate and clip norm"
        of_server = "that the server adds to the sum of a cohort, divided by the expected size of a cohort"
        known_of = of_server if run.config.privacy_unit == "client" else of_clients
        meaning = (
            f"The known noise is the noise {known_of}. Signal to noise is sqrt(max(update² - noise², 0)) / noise: an "
            "estimate, and 0 if the noise is larger than the update."
        )
    elif not run.config.private:
        middle, meaning = "The run has no noise.", ""
    else:
        middle = "The noise of this update is unknown."
        meaning = (
            "It is known only for the mean of SGD steps: not with momentum, adaptive clipping or another strategy."
        )
    return draw(
        "signal-and-noise",
        paint,
        title="Update against known noise",
        caption=f"Norm of each round's change of the global model, which is released and so public. {middle} {meaning}",
        alt=f"Lines: norm of the update per round, first {plain(lines[0]['update_norm'])}, last "
        f"{plain(lines[-1]['update_norm'])}; {middle}",
        folder=folder,
        table=thinned(("round", "update", "noise", "signal to noise"), rows, ROUNDS_FILE),
    )


def signal_to_noise(line: dict[str, float]) -> float:
    """The ratio for one round; signal and noise are independent, so squares add up. NaN for unknown or zero noise."""
    update, noise = line["update_norm"], line["noise_norm"]
    return math.sqrt(max(update**2 - noise**2, 0.0)) / noise if noise else math.nan


def time_and_bytes(run: Run, folder: Path) -> Iterator[Drawing]:
    """Seconds by phase, clients per second, and bytes in both directions."""
    if not run.timing:
        return
    phases: Counter[str] = Counter()
    for line in run.timing:
        phases.update(line["phases"])
    ordered = phases.most_common()
    seconds = sum(line["seconds"] for line in run.timing)

    def paint_phases(axes: Axes) -> None:
        names, values = [name for name, _ in ordered][::-1], [value for _, value in ordered][::-1]
        bars = axes.barh(names, values, color=GREEN.light, height=0.6)
        axes.bar_label(bars, [duration(value) for value in values], padding=3, color=INK.light, fontsize=8)
        axes.set(xlabel="seconds, all rounds together", xlim=(0, 1.25 * max(values, default=1) or 1))
        axes.grid(axis="y", visible=False)

    if ordered:
        yield draw(
            "time-by-phase",
            paint_phases,
            title="Time by phase",
            caption=f"{duration(seconds)} on {_machine(run)}; a nested phase counts only as itself. "
            f"The parts of a resumed run add up.",
            alt="Bars: " + ", ".join(f"{name} {duration(value)}" for name, value in ordered) + ".",
            folder=folder,
            table=Table(
                head=("phase", "seconds", "share"),
                rows=tuple((name, plain(v), f"{100 * v / seconds:.0f} %") for name, v in ordered),
            ),
        )
    lines = [line for line in run.timing if line["round"]]
    if not lines:
        return
    rounds = [line["round"] for line in lines]
    rate = [line["clients_per_second"] for line in lines]

    def paint_rate(axes: Axes) -> None:
        axes.plot(rounds, rate, color=GREEN.light, marker="o" if len(rounds) <= 15 else "")
        axes.set(xlabel="round", ylabel="clients per second", ylim=(0, None))
        whole_numbers(axes.xaxis)

    rows = [
        (
            str(line["round"]),
            plain(line["seconds"]),
            plain(line["clients_per_second"]),
            *(size(line.get(f"bytes_{way}", 0)) for way in ("down", "up")),
        )
        for line in lines
    ]
    table = thinned(("round", "seconds", "clients/s", "down", "up"), rows, "timing.jsonl")
    yield draw(
        "throughput",
        paint_rate,
        title="Throughput",
        caption=f"Clients whose update was accepted, per second of the whole round, on {_machine(run)}.",
        alt=f"Line: clients per second over rounds, median {plain(float(np.median(rate)))}.",
        folder=folder,
        table=table,
    )
    down, up = ([line.get(f"bytes_{way}", 0) for line in lines] for way in ("down", "up"))
    factor, unit = next((each for each in UNITS if max(*down, *up) >= each[0]), UNITS[-1])

    def paint_bytes(axes: Axes) -> None:
        axes.plot(rounds, [n / factor for n in down], color=BLUE.light, label="to clients")
        axes.plot(rounds, [n / factor for n in up], color=VERMILLION.light, ls=(0, (5, 2)), label="from clients")
        axes.set(xlabel="round", ylabel=f"{unit} per round", ylim=(0, None))
        whole_numbers(axes.xaxis)
        axes.legend(loc="best")

    yield draw(
        "bytes",
        paint_bytes,
        title="Traffic",
        caption=f"All clients of a round, as encoded for the network: models and assignments down, valid updates up. "
        f"In total {size(sum(down))} down and {size(sum(up))} up.",
        alt=f"Lines: {unit} per round, {size(sum(down))} down and {size(sum(up))} up in total.",
        folder=folder,
    )


def axis(run: Run, kind: str) -> str:
    """Label of the horizontal axis."""
    if kind == "round":
        return "round"
    return f"epsilon at delta = {run.config.delta:g} (maximum over clients, {run.config.accountant.upper()})"


def whole_numbers(axis: Axis) -> None:
    """Put ticks of ``axis`` at integers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def guarantee(run: Run) -> str:
    """(epsilon, delta) as text."""
    if math.isinf(run.epsilon):
        return "epsilon = ∞, no privacy"
    if math.isnan(run.epsilon):
        return "epsilon unknown"
    return f"epsilon = {plain(run.epsilon)} at delta = {run.config.delta:g} at the end"


def test_split(run: Run) -> str:
    """The examples of the evaluation, as text."""
    where = run.quality["measured_on"] if run.quality else measured_on(run.config)
    return f"the {where}" if run.num_test is None else f"the {where}, {run.num_test:,} examples"


def _clients(n: int) -> str:
    return "1 client" if n == 1 else f"{n:,} clients"


def _machine(run: Run) -> str:
    cpus = run.environment.get("cpus")
    where = f"a machine with {cpus} CPUs" if cpus else "an unknown machine"
    workers = run.config.workers
    return f"{where}, {f'with {workers} Ray workers' if workers else 'in one process'}"
