"""What each client paid before the first round of a run: the charges of ``fed-dpsat stats``, in round 0.

A run that takes constants from such a folder copies its charges into its own ledger before any release, so its epsilon
and its calibration are of statistics and training together. Round 0 is no round of training: ``rounds_by_client`` does
not count it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fed_dpsat.accounting.evaluations import evaluation_history
from fed_dpsat.accounting.event import History
from fed_dpsat.accounting.ledger import Head, PrivacyLedger
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import MACHINE, RunConfig
from fed_dpsat.settings.data import Data
from fed_dpsat.settings.flat import SPECS, read_toml
from fed_dpsat.settings.paths import without_folders

BEFORE = 0
"""The round of what is released before training."""
OF_INPUTS = MACHINE | {"input_columns", "columns_file", "tokenizer", "max_length"}
SAME = (
    *("privacy_unit", "seed"),
    *(f.name for f in dataclasses.fields(Data) if f.name not in OF_INPUTS and not f.name.startswith("features")),
)
"""Settings that decide which examples a client holds."""


def history_beside(config: RunConfig) -> History:
    """All that a client may pay in the run beside training: statistics before it, and evaluations."""
    return (*history_before(config), *evaluation_history(config))


def history_before(config: RunConfig) -> History:
    """The merged history that each client of the run begins with; empty without ``statistics_from``.

    Raises ``SettingError`` for a folder without complete statistics of the same clients, and ``LedgerError`` for a
    ledger that was changed.
    """
    if not config.statistics_from:
        return ()
    folder = Path(config.statistics_from)
    try:
        head = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))["ledger_head"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"`fed-dpsat stats` writes one ({error})"
        raise SettingError("statistics_from", str(folder), "a folder of statistics", remedy) from None
    made: dict[str, Any] = RunConfig.from_mapping(read_toml(folder / "config.toml")).settings()
    ours, theirs = (without_folders(settings, SPECS.values()) for settings in (config.settings(), made))
    for name in SAME:
        if ours[name] != theirs[name]:
            raise SettingError(
                name,
                ours[name],
                f"that of the statistics in {folder}, {theirs[name]!r}",
                "a client holds other examples then; set it to that, or make statistics with this one",
            )
    with PrivacyLedger(folder / "ledger.sqlite", readonly=True) as ledger:
        ledger.verify()
        ledger.check_extends(Head(**head), "when the statistics were written")
        found = ledger.histories_of(range(config.num_clients)).values
    if len(found) > 1 or not found[0]:
        raise SettingError("statistics_from", str(folder), "a folder in which each client paid alike", "make it anew")
    return found[0]
