"""Names of columns and classes as settings have them."""

from __future__ import annotations

import csv


def split_names(text: str) -> tuple[str, ...]:
    """Names by commas; one with a comma in it stands in double quotes."""
    return tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), []) if name.strip())
