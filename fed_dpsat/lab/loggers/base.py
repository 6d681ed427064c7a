"""The content that the built-in loggers send."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import MACHINE, RunConfig
from fed_dpsat.settings.flat import SPECS
from fed_dpsat.settings.paths import without_folders
from fed_dpsat.settings.values import Scalar

PRIVATE_PATHS = frozenset({"data_path", "test_path", "columns_file", "client_table", "statistics_from"})


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a round by name: its line, numbers of clients, timing.

    ================= ====================================================
    in the record     in the result
    ================= ====================================================
    null, inf, NaN    left out, as epsilon without noise
    "undefined"       left out, a metric without a value
    lists of clients  their number
    ``released``      left out: exact counts, which epsilon does not cover
    ================= ====================================================
    """
    found = {name: value for name, value in record.items() if name not in ("round", "accepted", "kept_model")}
    found |= {f"clients/{name}": _count(record[name]) for name in ("asked", "accepted", "dropped", "retired")}
    found |= {f"timing/{name}": value for name, value in _flat(record.get("timing", {})).items() if name != "round"}
    return {name: float(value) for name, value in found.items() if _is_finite(value)}


def public_settings(config: RunConfig) -> dict[str, Scalar]:
    """The settings without paths and addresses of the machine; of a plug-in and of weights the name of the file."""
    shown = {key: value for key, value in config.settings().items() if key not in MACHINE | PRIVATE_PATHS}
    return without_folders(shown, SPECS.values())


def need(package: str, logger: str) -> Any:
    """The module ``package``; raises ``PluginError`` with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise PluginError(
            f"loggers={logger!r} needs a package that is not installed ({error}); pip install 'fed-dpsat[{logger}]'"
        ) from None


def kept_id(folder: Path, logger: str) -> Path:
    """The file in which ``logger`` stores the run id of its tool, for a resumed run."""
    return folder / "loggers" / f"{logger}-run-id"


def _count(value: Any) -> int:
    return value if isinstance(value, int) else len(value)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = {f"{name}/{k}": v for k, v in _flat(value).items()} if isinstance(value, Mapping) else {name: value}
        flat |= inner
    return flat


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
