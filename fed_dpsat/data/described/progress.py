"""A progress bar on a terminal while files are read: the first pass over many images takes minutes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fed_dpsat.data.described.chunks import Chunk
from fed_dpsat.data.described.place import Place


def counted(chunks: Iterable[tuple[str, Chunk]], place: Place, total: int | None) -> Iterator[tuple[str, Chunk]]:
    """``chunks`` as they are, with a bar on standard error of the rows so far; nothing if that is no terminal.

    ``total`` is the number of rows, None if it is unknown before the files are read.
    """
    console = Console(stderr=True)
    columns = (TextColumn("reading {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(place.data_path or place.hub_repo, total=total)
        for split, chunk in chunks:
            yield split, chunk
            bar.advance(task, len(chunk))


def rows_in(place: Place, files: Sequence[Path]) -> int | None:
    """The number of rows in ``files``; None if it cannot be told without reading them, or a file is broken."""
    if place.data_source == "folder" and not place.per_line:
        return len(files)
    if place.data_source == "parquet":
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        try:
            return sum(int(pq.read_metadata(file).num_rows) for file in files)
        except pa.ArrowInvalid:  # the reader names the file
            return None
    return None
