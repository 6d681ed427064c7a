from __future__ import annotations

import re
from pathlib import Path

import pytest

from fed_dpsat.errors import InputError
from fed_dpsat.lab.report.condensed import write_runs
from fed_dpsat.run.reading import load_run
from simulations.gallery import SETS
from tools.gallery import write_gallery

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_gallery(DOCS / "runs", tmp_path_factory.mktemp("docs"))


@pytest.mark.slow
def test_the_page_in_docs_is_what_its_command_makes_of_the_committed_runs(made):
    assert made.read_text() == (DOCS / "gallery.md").read_text(), "run `python -m tools.gallery`"


def test_its_figures_are_there_and_small(made):
    shown = re.findall(r"\]\((gallery/[^)]+)\)", made.read_text())
    assert len(shown) >= 4
    for name in shown:
        assert (made.parent / name).stat().st_size < 60_000
        assert (DOCS / name).exists()
    assert {path.name for path in (DOCS / "gallery").iterdir()} == {Path(name).name for name in shown}


def test_each_set_of_runs_is_committed_small_and_without_a_path_of_a_machine():
    files = {path.stem: path for path in (DOCS / "runs").glob("*.jsonl")}
    assert files.keys() == SETS.keys()
    for path in files.values():
        assert path.stat().st_size < 50_000
        assert "/tmp" not in path.read_text()
        assert "/root" not in path.read_text()


def test_every_part_states_n_seeds_and_delta(made):
    for part in made.read_text().split("\n## ")[1:]:
        for words in ("n = 3 seeds", "seeds 0, 1, 2", "delta = 0.0001", "360 examples", "95 % intervals"):
            assert words in part


def test_no_runs_no_gallery(tmp_path, run_folder):
    with pytest.raises(InputError, match=r"has no \.jsonl file"):
        write_gallery(tmp_path, tmp_path)
    write_runs([load_run(run_folder)], tmp_path / "mine.jsonl")
    assert "1 groups" in write_gallery(tmp_path, tmp_path / "docs").read_text()
