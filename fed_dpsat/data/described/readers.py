"""Files of CSV, JSON lines and Parquet, folders of texts and images, and data sets of ``datasets``, as chunks of rows.

Each reader holds a block of the file at a time: for CSV ``BLOCK`` bytes and for JSON lines ``BLOCK_JSON``, which is the
longest row too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from fed_dpsat.data.described.chunks import ROWS, Chunk, Kind, check_columns
from fed_dpsat.errors import DataError

BLOCK = 2**26
BLOCK_JSON = 2**25  # the parser holds a block many times
IMAGES = (".png", ".jpg", ".jpeg")
Wanted = Mapping[str, Kind]


def read_csv(file: Path, wanted: Wanted, delimiter: str = ",") -> Iterator[Chunk]:
    """All values as bytes: what a column is, its declaration says, and not the first rows of the file."""
    from pyarrow import csv

    read = csv.ReadOptions(block_size=BLOCK, use_threads=False)
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with _readable(file, "CSV"):
        with csv.open_csv(file, read, parse) as head:
            check_columns(file, head.schema.names, wanted)
        types = dict.fromkeys(wanted, pa.binary())
        convert = csv.ConvertOptions(include_columns=list(wanted), column_types=types)
        yield from _numbered(str(file), csv.open_csv(file, read, parse, convert))


def read_jsonl(file: Path, wanted: Wanted) -> Iterator[Chunk]:
    """Numbers as float64, texts as bytes, other columns in the type that the first block of the file shows."""
    from pyarrow import json

    read = json.ReadOptions(block_size=BLOCK_JSON, use_threads=False)
    with _readable(file, "JSON lines"):
        with json.open_json(file, read) as head:
            types = {field.name: field.type for field in head.schema}
        check_columns(file, types, wanted)
        fields = [(name, _json_type(kind, types[name])) for name, kind in wanted.items()]
        parse = json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
        yield from _numbered(str(file), json.open_json(file, read, parse))


def _json_type(kind: Kind, found: Any) -> Any:
    if kind == "number" and (pa.types.is_integer(found) or pa.types.is_null(found)):
        return pa.float64()
    return pa.binary() if kind == "text" or pa.types.is_timestamp(found) or pa.types.is_null(found) else found


def read_parquet(file: Path, wanted: Wanted) -> Iterator[Chunk]:
    """Classes that ``datasets`` has named in the file have their names."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with _readable(file, "Parquet"), pq.ParquetFile(file) as parquet:
        check_columns(file, parquet.schema_arrow.names, wanted)
        named: Mapping[str, Any] = {}
        if b"huggingface" in (parquet.schema_arrow.metadata or {}):
            import datasets  # type: ignore[import-untyped]

            named = datasets.Features.from_arrow_schema(parquet.schema_arrow)
        batches = parquet.iter_batches(batch_size=ROWS, columns=list(wanted))
        yield from _numbered(str(file), (_with_names(batch.select(list(wanted)), named) for batch in batches))


def read_dataset(where: str, dataset: Any, wanted: Wanted) -> Iterator[Chunk]:
    """One split of ``datasets``, in its order."""
    check_columns(where, dataset.column_names, wanted)
    chosen = dataset.select_columns(list(wanted)).with_format("arrow")
    for start in range(0, len(chosen), ROWS):
        for batch in chosen[start : start + ROWS].combine_chunks().to_batches():
            yield Chunk(table=_with_names(batch, dataset.features), at=partial(_row, where, start))


def read_folder(base: Path, files: Sequence[Path], content: str, per_line: bool = False) -> Iterator[Chunk]:
    """The columns "file", "label" (the folder in ``base`` that a file is in, or null) and "image" or "text".

    With ``per_line`` each line of a file that is not empty is a row.
    """
    places: list[str] = []
    rows: list[tuple[str, str | None, bytes]] = []
    size = 0
    for file in files:
        inside = file.relative_to(base)
        folder = inside.parts[0] if len(inside.parts) > 1 else None
        for place, raw in _lines(file) if per_line else _whole(file):
            places.append(place)
            rows.append((str(inside), folder, raw))
            size += len(raw)
            if len(rows) == ROWS or size > BLOCK:
                yield _chunk(places, rows, content)
                places, rows, size = [], [], 0
    if rows:
        yield _chunk(places, rows, content)


def _whole(file: Path) -> Iterator[tuple[str, bytes]]:
    with _readable(file, "file"):
        yield str(file), file.read_bytes()


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    with _readable(file, "file"), file.open("rb") as opened:
        for number, line in enumerate(opened):
            if text := line.rstrip(b"\r\n"):
                yield f"{file}, row {number}", text


def _chunk(places: list[str], rows: list[tuple[str, str | None, bytes]], content: str) -> Chunk:
    files, labels, raw = zip(*rows, strict=True)
    if content == "image":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        data = pa.array([{"bytes": one, "path": None} for one in raw], kind)
    else:
        data = pa.array(raw, pa.binary())
    columns = {"file": pa.array(files, pa.string()), "label": pa.array(labels, pa.string()), content: data}
    return Chunk(table=pa.RecordBatch.from_pydict(columns), at=places.__getitem__)


READERS: Mapping[str, Callable[..., Iterator[Chunk]]] = {
    "csv": read_csv,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
}
SUFFIXES = {
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "jsonl": (".jsonl", ".json", ".ndjson", ".jsonl.gz"),
    "parquet": (".parquet",),
}
"""By source, how the names of its files end."""


@contextmanager
def _readable(file: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        said = str(error).partition("\n")[0]
        if "straddling" in said:
            said, remedy = "a row is too long", "store the rows as Parquet"
        else:
            remedy = "correct it"
        raise DataError(f"{file}: not a readable {kind} ({said}); {remedy}") from error


def _numbered(where: str, batches: Any) -> Iterator[Chunk]:
    row = 0
    for batch in batches:
        for first in range(0, batch.num_rows, ROWS):
            part = batch.slice(first, ROWS)
            yield Chunk(table=part, at=partial(_row, where, row))
            row += part.num_rows


def _row(where: str, first: int, i: int) -> str:
    return f"{where}, row {first + i}"


def _with_names(batch: Any, features: Mapping[str, Any]) -> Any:
    """``batch`` with names for class numbers that ``features`` of ``datasets`` name; -1 is no class."""
    for place, name in enumerate(batch.schema.names):
        feature: Any = features.get(name)
        inner: Any = getattr(feature, "feature", feature)
        if hasattr(inner, "int2str"):
            kind = pa.string() if feature is inner else pa.list_(pa.string())
            values = [_named(value, inner.names) for value in batch.column(name).to_pylist()]
            batch = batch.set_column(place, name, pa.array(values, kind))
    return batch


def _named(value: Any, classes: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, classes) for one in value]
    return None if value is None or value < 0 else classes[value]
