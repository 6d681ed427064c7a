"""The bundles of a sweep to which a run belongs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from fed_dpsat.errors import InputError
from fed_dpsat.settings.config import RunConfig

Bundles = dict[str, tuple[str, list[str]]]
"""By axis: the name of the bundle, and the settings that any bundle of the axis has."""


def bundles_of(folder: Path) -> Bundles:
    """The bundles of the run in ``folder``, from the tables of the sweep around it; empty for a run outside of one.

    Raises ``InputError`` if the tables are damaged.
    """
    about, results = (folder.absolute().parent.parent / name for name in ("sweep.json", "results.csv"))
    if folder.absolute().parent.name != "runs" or not (about.exists() and results.exists()):
        return {}
    try:
        axes = json.loads(about.read_text())["asked"]["axes"]
        with results.open(newline="") as lines:
            row = next((row for row in csv.DictReader(lines) if Path(row["folder"]).name == folder.name), None)
        known = RunConfig.__dataclass_fields__
        return {
            axis: (row[axis], sorted({setting for bundle in bundles.values() for setting in bundle}))
            for axis, bundles in axes.items()
            if row and axis not in known
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{about.parent} is a sweep whose tables are damaged ({error!r}); sweep again") from None
