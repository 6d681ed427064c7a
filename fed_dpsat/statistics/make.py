"""``make_statistics``: charge, release, write; in this order, so that a kill neither loses nor doubles a charge.

========================== ==============================================================================
killed                     the same command again
========================== ==============================================================================
before the charge          charges and releases
after the charge           finds its charge, which costs nothing more, and releases: nobody saw a number
after ``statistics.json``  prints the file; draws no noise and charges nothing
========================== ==============================================================================

Numbers are shown after the file is on disk, and only those in it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed_dpsat.accounting import PrivacyLedger, epsilon, noise_multiplier_for
from fed_dpsat.accounting.before import BEFORE
from fed_dpsat.accounting.evaluations import KIND
from fed_dpsat.accounting.event import UNITS
from fed_dpsat.accounting.ledger import Head
from fed_dpsat.client.totals import Floats, event_of, noise_of_totals, noised_totals
from fed_dpsat.data.described.columns import RELEASED
from fed_dpsat.errors import RunError, SettingError, written
from fed_dpsat.run.extension import changed_settings
from fed_dpsat.run.folder import fresh
from fed_dpsat.run.promise import threat_model
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.flat import read_toml
from fed_dpsat.settings.releases import named
from fed_dpsat.statistics.lines import Count, Labels, Line, Moments, Quantiles, Reading, Sizes, Totals
from fed_dpsat.statistics.release import contributions, with_count
from fed_dpsat.statistics.rows import Declared, Rows, declared_columns, rows_of
from fed_dpsat.step.noise import NOISE_SOURCES

OWN = frozenset({"config.toml", "config.toml.tmp", "ledger.sqlite", "ledger.sqlite.new", "ledger.sqlite.lock"}) | {
    "ledger.sqlite-journal",
    RELEASED,
    f"{RELEASED}.tmp",
}
"""What the command writes."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is in ``statistics.json`` of the folder ``path``."""

    path: Path
    content: Mapping[str, Any]


def make_statistics(config: RunConfig, out: str | Path | None = None) -> Statistics:
    """Release the statistics that ``config`` names and write them to ``out``; a complete folder is read.

    Raises ``SettingError`` for settings without statistics, and for a folder that holds anything else; ``DataError``
    for the data, before a charge; ``LedgerError`` if another process writes to the ledger.
    """
    check(config)
    config = config.with_absolute_paths()
    path = Path(out or config.out) if out or config.out else fresh("statistics")
    config = dataclasses.replace(config, out="", resume=False)
    begun = _check_folder(path, config)
    if (path / RELEASED).exists():
        return _read(path)
    columns = declared_columns(config) if {"moments", "quantiles"} & set(named(config.statistics)) else []
    rows = rows_of(config, columns)
    lines = with_count(lines_of(config, columns, rows), config.privacy_unit)
    joint = noise_multiplier_for(
        config.statistics_epsilon, config.delta, 1.0, 1, config.accountant, KIND[config.privacy_unit]
    )
    _check_noise(lines, joint, rows, config)
    with written(path):
        path.mkdir(parents=True, exist_ok=True)
    if not begun:
        _write(path / "config.toml", config.to_toml())
    with PrivacyLedger(path / "ledger.sqlite") as ledger:
        event = event_of(joint, config.privacy_unit)
        ledger.charge_many(BEFORE, 0, [(range(config.num_clients), event)])
        totals = noised_totals(contributions(lines, rows, config), joint, config, "statistics")
        public = {
            "num_clients": config.num_clients,
            "sizes": [int(size) for size in rows.sizes] if config.privacy_unit == "example" else None,
        }
        content = _content(lines, totals, joint, public, ledger, config)
    _write(path / RELEASED, json.dumps(content, indent=2) + "\n")
    return _read(path)


def check(config: RunConfig) -> None:
    """Raise ``SettingError`` for settings that no statistics can be made with."""
    unit = config.privacy_unit
    if unit not in KIND:
        remedy = f"set it to one of {', '.join(KIND)}"
        raise SettingError("privacy_unit", unit, "a unit that statistics are made for", remedy)
    if not config.statistics_epsilon:
        remedy = "set statistics_epsilon, 0.5 say: it is the epsilon of all statistics together"
        raise SettingError("statistics_epsilon", 0.0, "above 0", remedy)
    if config.statistics_from:
        remedy = "leave it out: it is for the run that takes the statistics"
        raise SettingError("statistics_from", config.statistics_from, "possible in `fed-dpsat stats`", remedy)


def lines_of(config: RunConfig, columns: list[Declared], rows: Rows) -> list[Line]:
    """The lines that ``statistics`` names. Raises ``SettingError`` for labels that are no classes."""
    found: list[Line] = []
    for name in named(config.statistics):
        if name == "moments":
            found += [Moments(column=column) for column in columns]
        elif name == "quantiles":
            found += [Quantiles(column=column, bins=config.statistics_bins) for column in columns]
        elif name == "labels":
            if rows.labels is None:
                remedy = "name the label column in statistics_columns for its moments"
                raise SettingError("statistics", config.statistics, "possible: labels are no classes here", remedy)
            found.append(Labels(class_names=rows.class_names, several=rows.labels.ndim == 2))
        elif config.privacy_unit == "client":
            found.append(Sizes(num_clients=config.num_clients))
    return found


def _check_noise(lines: list[Line], joint: float, rows: Rows, config: RunConfig) -> None:
    """Raise ``SettingError`` if a count of all units has more noise than the units that there are, a public number."""
    if not lines:
        remedy = "sizes are declared public with privacy_unit=example, and cost nothing; add moments or labels"
        raise SettingError("statistics", config.statistics, "something to pay for", remedy)
    units, noun = (len(rows.client), "examples") if config.privacy_unit == "example" else (rows.num_clients, "clients")
    noise = noise_of_totals(len(lines), joint, config)
    if noise >= units:
        bound = f"enough for {len(lines)} lines: the noise of a count is {noise:.0f}, of {units} {noun}"
        remedy = "raise it, or ask for fewer lines with statistics and statistics_columns"
        raise SettingError("statistics_epsilon", config.statistics_epsilon, bound, remedy)


def _content(
    lines: list[Line],
    totals: Mapping[str, Floats],
    joint: float,
    public: Mapping[str, Any],
    ledger: PrivacyLedger,
    config: RunConfig,
) -> dict[str, Any]:
    noise = noise_of_totals(len(lines), joint, config)
    count, count_noise = float(sum(public["sizes"] or ())), 0.0
    if any(isinstance(line, Count) for line in lines):
        count, count_noise = max(float(totals[Count.name][0]), noise), noise
    of_line = epsilon([event_of(joint * math.sqrt(len(lines)), config.privacy_unit)], config.delta, config.accountant)
    found, constants = [], {}
    for line in lines:
        total = Totals(total=totals[line.name], noise=noise, count=count, count_noise=count_noise)
        values = line.read(total)
        found.append({"name": line.name, "epsilon": of_line, "values": _plain(values)})
        if isinstance(line, Moments) and {"mean", "std"} <= values.keys():
            mean, std = values["mean"].value, values["std"].value
            constants[line.column.name] = line.column.constants(mean, std)
    return {
        "privacy_unit": UNITS[config.privacy_unit],
        "threat_model": threat_model(config),
        "epsilon": ledger.epsilon(config.delta, config.accountant),
        "delta": config.delta,
        "accountant": config.accountant,
        "noise_multiplier": joint,
        "noise": NOISE_SOURCES[config.noise_source].description,
        "ledger_head": ledger.head._asdict(),
        "declared_public": public,
        "lines": found,
        "columns": constants,
    }


def _plain(values: Mapping[str, Reading]) -> dict[str, dict[str, float]]:
    return {name: dataclasses.asdict(reading) for name, reading in values.items()}


def _check_folder(path: Path, config: RunConfig) -> bool:
    """Whether ``path`` holds statistics of these settings, complete or not; raises ``SettingError`` for others."""
    if not path.exists() or not any(path.iterdir()):
        return False
    if others := sorted({one.name for one in path.iterdir()} - OWN):
        raise SettingError("out", str(path), f"empty, or a folder of statistics (it has {others[0]})", "name another")
    if not (path / "config.toml").exists():
        return False
    begun = RunConfig.from_mapping(read_toml(path / "config.toml"))
    if changed := changed_settings(begun, config):
        bound = f"possible for statistics with another {changed[0]}"
        raise SettingError("out", str(path), bound, "name another folder: these would be further releases")
    return True


def _read(path: Path) -> Statistics:
    """The statistics in ``path``, after a check that its ledger holds their charge."""
    try:
        content = json.loads((path / RELEASED).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path / RELEASED} cannot be read ({error}); restore it from a backup") from None
    with PrivacyLedger(path / "ledger.sqlite", readonly=True) as ledger:
        ledger.verify()
        ledger.check_extends(Head(**content["ledger_head"]), "when the statistics were written")
    return Statistics(path=path, content=content)


def _write(path: Path, text: str) -> None:
    """Replace ``path``; it is on disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    with written(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
