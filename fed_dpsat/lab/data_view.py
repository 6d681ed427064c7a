"""The terminal view and the picture of a data set and of its division among clients: ``fed-dpsat data``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fed_dpsat.data.describe import Description, Number, Spread
from fed_dpsat.errors import SettingError
from fed_dpsat.lab.report import canvas
from fed_dpsat.lab.report.palette import BLUE, SERIES
from fed_dpsat.lab.report.training_figures import whole_numbers
from fed_dpsat.run.numbers import plain, spread_out
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.flat import parse_overrides, read_settings

SYMBOLS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""A class in a bar of text; with more classes a bar shows its length alone."""

PLAIN = "="

FEW_CLASSES, FEW_CLIENTS, LEAST_WIDTH = 20, 30, 20
BESIDE = len("  examples   ")
LONGEST_NAME = 24

PICTURES = (".png", ".svg", ".pdf")
PRIVATE = (
    "Counts, ranges and columns of training examples are private data: a simulation has them, the server of a real "
    "federation does not. No epsilon covers a setting that is chosen by them."
)


def settings_of(path: Path | None, overrides: Iterable[str]) -> RunConfig:
    """The settings of a TOML file, if any, and ``key=value`` strings; without privacy if they do not choose a noise."""
    values = {**({} if path is None else read_settings(path)), **parse_overrides(overrides)}
    chosen = values.keys() & {"private", "noise_multiplier", "target_epsilon"}
    return RunConfig.from_mapping(values if chosen else {**values, "private": False})


def view(found: Description, test: str, width: int) -> Iterator[RenderableType]:
    """``found`` as tables, bars of at most ``width`` columns, and notes; ``test`` says what the test split is."""
    yield f"{found.name}: {found.examples['train']:,} training examples"
    yield f"evaluated on {found.examples['test']:,} examples: {test}"
    yield ""
    if found.features:
        yield f"inputs are features of a public extractor, SHA-256 {found.features[:16]}"
    yield _inputs(found)
    yield from _labels(found)
    if found.columns:
        yield ""
        yield _columns(found)
    yield ""
    yield from _clients(found, width)
    yield ""
    yield PRIVATE


def _inputs(found: Description) -> Table:
    texts = any(array.lengths for array in found.inputs)
    table = _table("input", "type", "shape of one", *(["tokens", "length: least, quartiles, most"] if texts else []))
    for array in found.inputs:
        lengths = array.lengths.get("train")
        of_text = [f"{array.vocabulary_size:,}", ", ".join(map(plain, _five(lengths)))] if lengths else []
        shape = f"at most {array.shape[0]:,}" if array.lengths else str(list(array.shape))
        table.add_row(array.name, array.type, shape, *of_text)
    return table


def _labels(found: Description) -> Iterator[RenderableType]:
    labels = found.labels
    yield ""
    if labels.ranges:
        table = _table(f"labels: {labels.kind}", "training", "test")
        for name, spreads in labels.ranges.items():
            table.add_row(name, _words(spreads["train"]), _words(spreads["test"]))
        yield table
    elif labels.counts and len(labels.counts) <= FEW_CLASSES:
        table = _table(f"labels: {labels.kind}", "training", "test")
        for name, counts in labels.counts.items():
            table.add_row(name, f"{counts['train']:,}", f"{counts['test']:,}")
        yield table
    elif labels.counts:
        spread = _words(Spread.of([counts["train"] for counts in labels.counts.values()]))
        yield f"labels: {labels.kind} of {len(labels.counts)}; training examples of a class: {spread}"
    else:
        yield f"labels: {labels.kind}"


def _columns(found: Description) -> Table:
    table = _table("column", "type", "values", "training examples of a value", "without a value")
    for column in found.columns:
        table.add_row(column.name, column.type, f"{column.values:,}", _words(column.examples), f"{column.missing:,}")
    return table


def _clients(found: Description, width: int) -> Iterator[RenderableType]:
    clients = found.clients
    by = f" by {clients.partition_by}" if clients.partition_by else ""
    yield f"partition {clients.partition}{by}: {len(clients.sizes):,} clients"
    table = _table("of a client", "least", "25 %", "median", "75 %", "most")
    rows = {
        "training examples": clients.size,
        "classes": clients.classes,
        f"values of {clients.partition_by}": clients.values,
    }
    for name, spread in rows.items():
        if spread is not None:
            table.add_row(name, *map(plain, _five(spread)))
    yield table
    if clients.unused:
        yield f"{clients.unused:,} training examples are in no part: no client trains on them"
    if clients.unheld:
        yield f"no client holds an example of: {', '.join(clients.unheld)}"
    yield ""
    yield from bars(found, width)


def bars(found: Description, width: int) -> Iterator[RenderableType]:
    """A bar for each client, of one symbol for each class; of some clients by size if there are many."""
    clients, names = found.clients, list(found.labels.counts)
    shown = list(range(len(clients.sizes)))
    if len(shown) > FEW_CLIENTS:
        by_size = np.argsort(-np.array(clients.sizes), kind="stable").tolist()
        shown = [by_size[place] for place in spread_out(len(by_size), FEW_CLIENTS)]
        yield f"{FEW_CLIENTS} of {len(by_size):,} clients, from the largest to the smallest"
    symbols = clients.counts is not None and len(names) <= len(SYMBOLS)
    called = [f"{client} {clients.called[client] if clients.called else ''}"[:LONGEST_NAME] for client in shown]
    room = max(LEAST_WIDTH, width - max(map(len, ["client", *called])) - BESIDE)
    table = _table("client", "examples", "classes" if symbols else "")
    for name, client in zip(called, shown, strict=True):
        size = clients.sizes[client]
        cells = max(1, round(room * size / max(clients.sizes)))
        bar = Text("" if symbols else PLAIN * cells, no_wrap=True, style=BLUE.light)
        for place, count in enumerate(cells_of(clients.counts[client], cells) if symbols and clients.counts else ()):
            bar.append(SYMBOLS[place] * count, style=f"black on {SERIES[place % (len(SERIES) - 1)].light}")
        table.add_row(name, f"{size:,}", bar)
    yield table
    if symbols:
        yield "classes: " + ", ".join(f"{symbol} {name}" for symbol, name in zip(SYMBOLS, names, strict=False))


def cells_of(counts: Sequence[int], width: int) -> list[int]:
    """``counts`` as whole shares of ``width``, by largest remainders (the first of equals)."""
    exact = np.array(counts, dtype=np.float64) * width / sum(counts)
    cells = np.floor(exact).astype(np.int64)
    cells[np.argsort(-(exact - cells), kind="stable")[: width - cells.sum()]] += 1
    return [int(cell) for cell in cells]


def draw_partition(found: Description, path: Path) -> None:
    """A bar for each client into ``path``: its examples by class; raises ``InputError`` for another kind of file."""
    if path.suffix not in PICTURES:
        raise SettingError("--picture", str(path), f"a file {', '.join(PICTURES)}", "its suffix decides the format")
    clients, names = found.clients, list(found.labels.counts)
    at = np.arange(len(clients.sizes))
    thick = 0.9 if len(at) <= FEW_CLIENTS else 1.0
    with canvas.style():
        figure, axes = canvas.blank(width=7.2, height=3.6)
        if clients.counts is None:
            axes.bar(at, clients.sizes, width=thick, color=BLUE.light)
        else:
            counts = np.array(clients.counts)
            below = np.cumsum(counts, axis=1) - counts
            for place, colour in enumerate(_colours(len(names))):
                axes.bar(at, counts[:, place], bottom=below[:, place], width=thick, color=colour, label=names[place])
            if len(names) <= FEW_CLASSES:
                figure.legend(loc="outside right upper", title="class", reverse=True)
        axes.set(xlabel="client", ylabel="training examples", xlim=(-0.6, len(at) - 0.4))
        axes.grid(axis="x", visible=False)
        whole_numbers(axes.xaxis)
        axes.set_title(f"{found.name}, partition {clients.partition}, {len(at):,} clients", loc="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)


def _colours(count: int) -> Sequence[Any]:
    if count <= len(SERIES):
        return [colour.light for colour in SERIES[:count]]
    maps = canvas.matplotlib().colormaps
    if count <= FEW_CLASSES:
        return [maps["tab10" if count <= 10 else "tab20"](place) for place in range(count)]
    return [maps["turbo"](place / (count - 1)) for place in range(count)]


def _table(*head: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(name, style="cyan" if not place else None, no_wrap=True)
    return table


def _words(spread: Spread | None) -> str:
    if spread is None:
        return "none"
    least, _, median, _, most = map(plain, _five(spread))
    return f"{least} to {most}, median {median}"


def _five(spread: Spread) -> tuple[Number, ...]:
    return spread.least, spread.quarter, spread.median, spread.three_quarters, spread.most
