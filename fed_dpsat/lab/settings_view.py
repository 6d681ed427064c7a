"""The settings in the help of ``fed-dpsat run``: the few that a beginner needs, or all by their groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fed_dpsat.settings.combinations import GROUPS
from fed_dpsat.settings.flat import SPECS

FEW = (
    *("dataset", "num_clients", "partition", "model", "optimizer", "lr", "local_steps", "sample_rate"),
    *("num_rounds", "target_epsilon", "delta", "workers"),
)
"""The settings that most runs set."""


def title(group: type) -> str:
    """The name of a group of settings."""
    return (group.__doc__ or "").partition(":")[0]


def few() -> Iterator[Panel]:
    """One panel with ``FEW``."""
    heading = f"Settings: the usual {len(FEW)} of {len(SPECS)} (--help-all shows all)"
    yield _panel(heading, [SPECS[name] for name in FEW])


def by_group() -> Iterator[Panel]:
    """A panel for each group."""
    for group in GROUPS:
        yield _panel(f"Settings: {title(group)}", dataclasses.fields(group))


def _panel(heading: str, specs: Any) -> Panel:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold cyan")
    table.add_column(no_wrap=True, style="bold yellow")
    table.add_column()
    for spec in specs:
        default = f" [default: {spec.default}]" if spec.default != "" else ""
        table.add_row(spec.name, str(spec.type), Text(spec.metadata["doc"] + default))
    return Panel(table, title=heading, title_align="left", border_style="dim")
