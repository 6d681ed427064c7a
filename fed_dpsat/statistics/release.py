"""What each client adds to the lines, with a norm of at most 1 for one unit (``fed_dpsat.client.totals``)."""

from __future__ import annotations

from collections.abc import Sequence

from fed_dpsat.client.totals import Floats, weights_of
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.statistics.lines import Count, Line
from fed_dpsat.statistics.rows import Rows


def contributions(lines: Sequence[Line], rows: Rows, config: RunConfig) -> dict[str, Floats]:
    """By line, ``[num_clients, d]``: what each client adds; one unit has at most norm 1 in each."""
    weights = weights_of(rows.sizes, config)[:, None]
    return {line.name: line.sums(rows) * (1.0 if line.of_clients else weights) for line in lines}


def with_count(lines: Sequence[Line], unit: str) -> list[Line]:
    """``lines`` and, if statistics of rows need it and the number of rows is private, their count."""
    needed = unit == "client" and any(not line.of_clients for line in lines)
    return [*lines, *([Count()] if needed else [])]
