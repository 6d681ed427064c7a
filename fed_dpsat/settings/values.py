"""One setting: how a group declares it, and the check of one value."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any, NoReturn

from fed_dpsat.errors import SettingError
from fed_dpsat.left import successor
from fed_dpsat.settings.paths import Placed

Scalar = bool | int | float | str

TYPES: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}


def setting(
    default: Scalar,
    doc: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    choices: tuple[str, ...] = (),
    may_change: bool = False,
    path: Placed | None = None,
) -> Any:
    """A field of a group. With ``may_change`` a resumed run can have another value; ``path`` finds paths in it."""
    bounds = {"above": above, "least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata={"doc": doc, **bounds, "may_change": may_change, "path": path})


def check_value(spec: dataclasses.Field[Any], value: object) -> None:
    """Raise ``SettingError`` unless ``value`` has the type and the bounds of ``spec``."""
    limits, kind = spec.metadata, str(spec.type)
    remedy = f"it is the {limits['doc']}"
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise SettingError(spec.name, value, f"of type {kind}", remedy)
    if limits["choices"] and value not in limits["choices"]:
        near = difflib.get_close_matches(str(value), limits["choices"], n=1)
        bound = f"one of {', '.join(limits['choices'])}"
        hint = f"did you mean {near[0]}?" if near else remedy
        raise SettingError(spec.name, value, bound, successor(spec.name, value) or hint)
    if kind != "str" and not (limits["above"] < value and limits["least"] <= value <= limits["most"]):
        low = f"above {limits['above']:g}" if limits["above"] > -math.inf else f"at least {limits['least']:g}"
        high = f" and at most {limits['most']:g}" if limits["most"] < math.inf else ""
        raise SettingError(spec.name, value, low + high, remedy)


def refuse(config: object, name: str, bound: str, remedy: str) -> NoReturn:
    """Raise ``SettingError`` for the value that ``config`` has for ``name``."""
    raise SettingError(name, getattr(config, name), bound, remedy)
