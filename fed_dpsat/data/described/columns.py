"""Declared columns of a table: numbers with constants that scale them, and categories with a list of values."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from fed_dpsat.data.described.chunks import Chunk, chunk_names, chunk_numbers, names_of, shown
from fed_dpsat.errors import SettingError

KEYS = ("mean", "std", "low", "high", "log", "missing", "values")
EXAMPLE = "write {mean = 40, std = 15}, {low = 0, high = 99}, {} for a number as it is, or {values = ['a', 'b']}"


@dataclass(frozen=True, kw_only=True)
class Number:
    """``(x - shift) / scale``, of ``log(1 + x)`` with ``log``; ``missing`` is the result if there is no value."""

    name: str
    shift: float = 0.0
    scale: float = 1.0
    log: bool = False
    missing: float | None = None

    def encoded(self, chunk: Chunk) -> np.ndarray:
        """float32 ``[n, 1]``, or ``[n, 2]`` with ``missing``: the second is 1 if there is no value, and 0 otherwise.

        Raises ``DataError`` with file and row for NaN, infinity or no value that is not declared as ``missing``.
        """
        raw = chunk_numbers(chunk, self.name)
        none = ~np.isfinite(raw)
        if self.missing is None:
            chunk.refuse(
                none,
                self.name,
                lambda i: (
                    f"is {_absent(raw[i])}, not a finite number; correct it, or declare missing = 0 for the column"
                ),
            )
        if self.log:
            remedy = "which has no log(1 + x); correct it, or leave out log"
            chunk.refuse(~none & (raw <= -1), self.name, lambda i: f"is {raw[i]:g}, {remedy}")
            raw = np.log1p(np.where(none, 0.0, raw))
        values = (np.where(none, 0.0, raw) - self.shift) / self.scale
        with np.errstate(over="ignore"):
            single = values.astype(np.float32)
        chunk.refuse(~np.isfinite(single), self.name, lambda i: f"is {values[i]:g} after scaling; correct it")
        if self.missing is None:
            return single[:, None]
        return np.stack([np.where(none, np.float32(self.missing), single), none.astype(np.float32)], axis=1)


@dataclass(frozen=True, kw_only=True)
class Category:
    """One of ``values``; another value, or none, is "other", the code after the last."""

    name: str
    values: tuple[str, ...]

    @property
    def width(self) -> int:
        """The number of features of one-hot."""
        return len(self.values) + 1

    def codes(self, chunk: Chunk) -> np.ndarray:
        """int64 ``[n]``, in ``[0, width)``."""
        found = pc.index_in(chunk_names(chunk, self.name), value_set=pa.array(self.values, pa.string()))
        return np.asarray(pc.fill_null(found, len(self.values)).to_numpy(zero_copy_only=False), dtype=np.int64)

    def encoded(self, chunk: Chunk) -> np.ndarray:
        """float32 ``[n, width]``, one-hot."""
        return np.asarray(np.eye(self.width, dtype=np.float32)[self.codes(chunk)])


Column: TypeAlias = Number | Category


RELEASED = "statistics.json"
"""The file of ``fed-dpsat stats``; its "columns" are declarations."""


def declared(columns: Mapping[str, Any] | None, columns_file: str, statistics_from: str = "") -> dict[str, Column]:
    """The columns of ``dataset_args`` or of a TOML file with a table for each. Raises ``SettingError``.

    Those that a folder of ``fed-dpsat stats`` has constants of are as it says.
    """
    specs = specs_of(columns, columns_file)
    released = {name: spec for name, spec in _released(statistics_from).items() if name in specs}
    return {name: _column(name, spec) for name, spec in (specs | released).items()}


def ranges(specs: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The declared low and high of each number that has them, of ``log(1 + x)`` with log. Raises ``SettingError``."""
    found = {}
    for name, spec in specs.items():
        column = _column(name, spec)
        if isinstance(column, Number) and "low" in spec:
            found[name] = column.shift, column.shift + column.scale
    return found


def unscaled(columns: Mapping[str, Column]) -> dict[str, Column]:
    """The ``columns`` with each number as it is in the file, or its ``log(1 + x)``, that may be missing."""
    return {
        name: replace(column, shift=0.0, scale=1.0, missing=0.0) if isinstance(column, Number) else column
        for name, column in columns.items()
    }


def specs_of(columns: Mapping[str, Any] | None, columns_file: str) -> dict[str, Any]:
    """The declarations as they are written, not checked one by one. Raises ``SettingError`` for what has no such."""
    if columns and columns_file:
        raise SettingError("columns_file", columns_file, "possible with columns in dataset_args", "keep one of them")
    if columns_file:
        try:
            columns = tomllib.loads(Path(columns_file).expanduser().read_text(encoding="utf-8"))
        except FileNotFoundError:
            remedy = "name the TOML file that declares the columns"
            raise SettingError("columns_file", columns_file, "a file that exists", remedy) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SettingError("columns_file", columns_file, "a readable TOML file", str(error)) from None
    if not isinstance(columns, Mapping | None):
        raise SettingError("columns", columns, "a table of columns", EXAMPLE)
    return dict(columns or {})


def _released(folder: str) -> dict[str, Any]:
    """The declarations of a folder of ``fed-dpsat stats``; nothing without a folder."""
    if not folder:
        return {}
    try:
        found: dict[str, Any] = json.loads((Path(folder) / RELEASED).read_text(encoding="utf-8"))["columns"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"`fed-dpsat stats` writes one ({error})"
        raise SettingError("statistics_from", folder, f"a folder with {RELEASED}", remedy) from None
    return found


def _column(name: str, spec: Any) -> Column:
    setting = f"columns.{name}"
    if not isinstance(spec, Mapping):
        raise SettingError(setting, spec, "a declaration", EXAMPLE)
    if unknown := sorted(spec.keys() - set(KEYS)):
        raise SettingError(
            setting, dict(spec), f"a declaration: {unknown[0]!r} is no key of it", f"use {', '.join(KEYS)}"
        )
    if "values" in spec:
        return _category(name, setting, spec)
    log = spec.get("log", False)
    if not isinstance(log, bool):
        raise SettingError(f"{setting}.log", log, "true or false", "set one of them")
    given = {key: _finite(f"{setting}.{key}", value) for key, value in spec.items() if key != "log"}
    if given.keys() & {"low", "high"}:
        if not given.keys() >= {"low", "high"} or given.keys() & {"mean", "std"}:
            raise SettingError(setting, dict(spec), "low and high, or mean and std", "declare one pair")
        low, high = given["low"], given["high"]
        if log and low <= -1:
            raise SettingError(f"{setting}.low", low, "above -1 with log", "log(1 + x) has no value there")
        if log:
            low, high = math.log1p(low), math.log1p(high)
        shift, scale = low, high - low
    else:
        shift, scale = given.get("mean", 0.0), given.get("std", 1.0)
    if not scale > 0:
        raise SettingError(setting, dict(spec), "with std above 0, or high above low", "correct it")
    return Number(name=name, shift=shift, scale=scale, log=log, missing=given.get("missing"))


def _category(name: str, setting: str, spec: Mapping[str, Any]) -> Category:
    values = spec["values"]
    if len(spec) > 1 or not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise SettingError(setting, dict(spec), "a list of values alone", EXAMPLE)
    names = names_of(values)
    if len(set(names)) < len(names):
        raise SettingError(setting, shown(list(names)), "a list without repetition", "name each value once")
    return Category(name=name, values=names)


def _finite(setting: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SettingError(setting, value, "a finite number", "declare a public constant")
    return float(value)


def _absent(value: float) -> str:
    return "empty or NaN" if math.isnan(value) else f"{value:g}"
