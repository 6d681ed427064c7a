"""docs/sources.md names every paper that the code names, and files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sources.md").read_text()
PAPER = re.compile(r"\b\d{4}\.\d{5}\b")
CODE = sorted(path for folder in ("fed_dpsat", "strategies") for path in (ROOT / folder).rglob("*.py"))


def papers_without_a_row(code: str, page: str) -> set[str]:
    return set(PAPER.findall(code)) - set(PAPER.findall(page))


def test_every_paper_that_the_code_names_has_a_row():
    assert papers_without_a_row("\n".join(path.read_text() for path in CODE), PAGE) == set()


def test_a_paper_without_a_row_is_found():
    assert papers_without_a_row("(arXiv 2401.99999)", PAGE) == {"2401.99999"}


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`([\w/]+\.(?:py|toml|md))`", PAGE))))
def test_each_named_file_is_there(file):
    assert (ROOT / file).is_file()


def test_no_paper_that_the_code_names_is_called_left_out():
    left_out = set(PAPER.findall(PAGE.partition("## Left out")[2]))
    named = {paper for path in CODE for paper in PAPER.findall(path.read_text())}
    assert left_out & named == set()
