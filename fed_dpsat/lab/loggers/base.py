"""What the built-in loggers send."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import MACHINE, RunConfig
from fed_dpsat.settings.values import Scalar

PRIVATE_PATHS = frozenset({"data_path", "client_table"})


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a round by name: quality, epsilon and what else its line holds, clients counted, timing.

    ================= ====================================================
    in the record     here
    ================= ====================================================
    null, inf, NaN    left out: no noise has no epsilon, no evaluation no accuracy
    clients by name   how many there are
    ``released``      left out: exact counts, which epsilon does not cover
    ================= ====================================================
    """
    found = {name: value for name, value in record.items() if name not in ("round", "accepted", "kept_model")}
    found |= {f"clients/{name}": _count(record[name]) for name in ("asked", "accepted", "dropped", "retired")}
    found |= {f"timing/{name}": value for name, value in _flat(record.get("timing", {})).items() if name != "round"}
    return {name: float(value) for name, value in found.items() if _is_finite(value)}


def public_settings(config: RunConfig) -> dict[str, Scalar]:
    """The settings that say what runs; those that say where (paths, addresses) are nobody else's business."""
    return {key: value for key, value in config.settings().items() if key not in MACHINE | PRIVATE_PATHS}


def need(package: str, logger: str) -> Any:
    """The module ``package``, or a ``PluginError`` that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise PluginError(
            f"loggers={logger!r} needs a package that is not installed ({error}); pip install 'fed-dpsat[{logger}]'"
        ) from None


def kept_id(folder: Path, logger: str) -> Path:
    """The file in which ``logger`` keeps how its tool calls the run, for when the run is resumed."""
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
