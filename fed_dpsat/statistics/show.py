"""Statistics in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fed_dpsat.statistics.make import Statistics


def print_statistics(console: Console, made: Statistics) -> None:
    """A row for each number with the deviation of its noise, and the epsilon of each line and of all."""
    found = made.content
    table = Table("statistic", "of", "value", "noise (1 sd)", "epsilon of the line", box=None, pad_edge=False)
    for line in found["lines"]:
        of_line = f"{line['epsilon']:.4g}"
        for i, (name, reading) in enumerate(line["values"].items()):
            of_first = (line["name"], of_line) if i == 0 else ("", "")
            table.add_row(of_first[0], name, f"{reading['value']:.4g}", f"{reading['noise']:.2g}", of_first[1])
        if not line["values"]:
            table.add_row(line["name"], "more noise than data", "", "", of_line)
    console.print(table)
    if sizes := found["declared_public"]["sizes"]:
        console.print(f"Examples per client, declared public: {_spread(sizes)}.", highlight=False)
    console.print(
        f"All lines together: epsilon {found['epsilon']:.4f} at delta {found['delta']:g}; protects "
        f"{found['privacy_unit']}.\nAgainst {found['threat_model']}.\nNoise: {found['noise']}.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"A run takes them with statistics_from={made.path}", highlight=False, markup=False, soft_wrap=True)


def _spread(sizes: Sequence[int]) -> str:
    ordered = sorted(sizes)
    return f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}, {sum(ordered)} together"
