"""A bar on a terminal while files are read, and nothing elsewhere."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from fed_dpsat.data.described import progress
from fed_dpsat.data.described.chunks import Chunk
from fed_dpsat.data.described.place import Place
from fed_dpsat.data.described.progress import counted, rows_in


def place(source, **more):
    return Place(data_source=source, data_path="scans", all_private=True, **more)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_rows_so_far_are_shown_of_all_and_the_chunks_are_the_same(monkeypatch, terminal):
    out = io.StringIO()
    made = Console(file=out, force_terminal=terminal, width=100)
    monkeypatch.setattr(progress, "Console", lambda stderr: made)
    chunks = [("train", Chunk(table=pa.record_batch({"a": [1] * n}), at=str)) for n in (2, 3)]
    assert list(counted(chunks, place("csv"), 5)) == chunks
    assert ("reading scans" in out.getvalue()) == ("5/5" in out.getvalue()) == terminal


def test_rows_are_counted_before_if_the_files_say_them(tmp_path):
    pq.write_table(pa.table({"a": [1, 2, 3]}), tmp_path / "a.parquet")
    assert rows_in(place("parquet"), [tmp_path / "a.parquet"] * 2) == 6
    assert rows_in(place("folder", content="image"), [tmp_path] * 4) == 4
    assert rows_in(place("folder", per_line=True), [tmp_path] * 4) is None
    assert rows_in(place("csv"), [tmp_path]) is None


def test_reading_a_data_set_shows_it(monkeypatch, build, write):
    shown = []
    monkeypatch.setattr(
        "fed_dpsat.data.described.load.counted", lambda chunks, place, total: shown.append(total) or chunks
    )
    write("train/a.csv", "text,label\nx,b\n")
    write("test/a.csv", "text,label\nx,b\n")
    build("text", "", data_source="csv", class_names="b", label_column="label")
    assert shown == [None]
