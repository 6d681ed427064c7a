"""Some rows of a file, with the place of each for errors, and their values in the few types that an encoder knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from fed_dpsat.errors import DataError

ROWS = 1_000
"""Of a file that are in memory as Python objects at a time."""

Kind: TypeAlias = Literal["text", "number", "any"]
"""What a column is read as: bytes of a text, float64, or the type that the file says."""

NULLS = ("", "#N/A", "N/A", "n/a", "NA", "NULL", "null", "NaN", "nan", "None")
"""The texts of a CSV file that stand for no number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """The rows of ``table`` (``pyarrow.RecordBatch``); ``at(i)`` names file and row of the i-th, from 0."""

    table: Any
    at: Callable[[int], str]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> Any:
        """The values, in a plain form of their type."""
        column = self.table.column(name)
        if pa.types.is_string_view(column.type):
            return column.cast(pa.string())
        return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column

    def picked(self, chosen: np.ndarray) -> Chunk:
        """The rows with true in ``chosen[n]``."""
        rows = np.flatnonzero(chosen)
        return dataclasses.replace(self, table=self.table.take(pa.array(rows)), at=lambda i: self.at(int(rows[i])))

    def refuse(self, wrong: np.ndarray, name: str, what: Callable[[int], str]) -> None:
        """Raise ``DataError`` for the first row with true in ``wrong[n]``; ``what(i)`` says why, and a remedy."""
        if len(rows := np.flatnonzero(wrong)):
            raise DataError(f"{self.at(int(rows[0]))}: column {name!r} {what(int(rows[0]))}")


def check_columns(where: object, there: Collection[str], wanted: Collection[str]) -> None:
    """Raise ``DataError`` for a wanted column that is not there."""
    for name in wanted:
        if list(there).count(name) > 1:
            raise DataError(f"{where}: column {name!r} is there twice; rename one")
        if name not in there:
            raise DataError(f"{where}: no column {name!r}; there are {', '.join(map(repr, there))}: name one of them")


def shown(value: object) -> str:
    """A value in an error, at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def names_of(values: Sequence[object]) -> tuple[str, ...]:
    """Declared values as names: those that ``chunk_names`` gives for the same values in a file."""

    def name(value: object) -> str:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return str(value).lower() if isinstance(value, bool) else str(value)

    return tuple(map(name, values))


def chunk_names(chunk: Chunk, column: str) -> Any:
    """``pyarrow`` strings ``[n]``, null for no value: 3 and 3.0 are "3", true is "true"."""
    values = chunk.column(column)
    if is_text(values.type):
        return chunk_texts(chunk, column)
    return plain_names(chunk, column, values)


def plain_names(chunk: Chunk, column: str, values: Any) -> Any:
    """The names of ``values`` that are no texts."""
    if pa.types.is_floating(values.type):
        whole = pc.fill_null(pc.equal(values, pc.floor(values)), False)
        safe = pc.and_(whole, pc.less(pc.abs(values), 2.0**53))
        integers = pc.cast(pc.if_else(safe, values, None), pa.int64())
        return pc.if_else(safe, pc.cast(integers, pa.string()), pc.cast(values, pa.string()))
    if pa.types.is_nested(values.type):
        raise DataError(f"{chunk.at(0)}: column {column!r} is {values.type}, not one value a row; name another column")
    return pc.cast(values, pa.string())


def chunk_texts(chunk: Chunk, column: str, errors: str = "strict") -> Any:
    """``pyarrow`` strings ``[n]`` of UTF-8; bytes that are not are refused, or replaced if ``errors="replace"``."""
    values = chunk.column(column)
    if not is_text(values.type):
        raise DataError(f"{chunk.at(0)}: column {column!r} is {values.type}, not text; name another column")
    try:
        texts = pc.cast(values, pa.string()) if is_bytes(values.type) else values
        texts.validate(full=True)  # a cast checks bytes, but a file can say that any bytes are a text
        return pc.cast(texts, pa.string())
    except pa.ArrowInvalid:
        pass
    decoded = []
    for i, raw in enumerate(values.cast(pa.large_binary()).to_pylist()):
        try:
            decoded.append(raw and raw.decode(errors=errors))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{chunk.at(i)}: column {column!r} is not UTF-8 ({error.reason} at byte {error.start}); convert the "
                "file, or set errors = 'replace' in dataset_args"
            ) from None
    return pa.array([text.decode() if text == b"" else text for text in decoded], pa.string())


def chunk_numbers(chunk: Chunk, column: str) -> np.ndarray:
    """float64 ``[n]``, NaN for no value; raises ``DataError`` for a value that is no number."""
    values = chunk.column(column)
    if is_text(values.type):
        texts = pc.utf8_trim_whitespace(chunk_texts(chunk, column))
        texts = pc.if_else(pc.is_in(texts, value_set=pa.array(NULLS)), None, texts)
        try:
            values = pc.cast(texts, pa.float64())
        except pa.ArrowInvalid:
            wrong = np.array([not _is_number(text) for text in texts.to_pylist()])
            remedy = "correct it, or declare its column as categories (values) or classes (task)"
            chunk.refuse(wrong, column, lambda i: f"is {shown(texts[i].as_py())}, which is no number; {remedy}")
            raise
    elif pa.types.is_decimal(values.type) or pa.types.is_boolean(values.type):
        values = pc.cast(values, pa.float64())
    elif not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_null(values.type)):
        raise DataError(f"{chunk.at(0)}: column {column!r} is {values.type}, not numbers; name another column")
    return np.asarray(pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)


def is_text(kind: Any) -> bool:
    """Whether a column holds texts or bytes."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or is_bytes(kind))


def is_bytes(kind: Any) -> bool:
    """Whether a column holds bytes."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_number(text: str | None) -> bool:
    try:
        return text is None or float(text) is not None
    except ValueError:
        return False
