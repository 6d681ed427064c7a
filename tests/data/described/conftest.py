"""Data sets of files that a test writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fed_dpsat import plugins


@pytest.fixture
def build(tmp_path):
    """``build(dataset, arguments, **settings)``: as a configuration builds it, in the folder of the test."""

    def build(dataset: str, arguments: str = "", **settings):
        given = {"data_path": str(tmp_path / "d"), "cache_dir": str(tmp_path / "cache"), **settings}
        return plugins.build("dataset", dataset, given, arguments)

    (tmp_path / "d").mkdir()
    return build


@pytest.fixture
def write(tmp_path):
    """``write(name, content)``: a file in the folder of the data; rows become JSON lines."""

    def write(name: str, content: str | bytes | list[dict]) -> Path:
        file = tmp_path / "d" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    return write
