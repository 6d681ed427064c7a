"""The figures of README.md: what is read of them, what is drawn, and, slowly, whether they hold."""

from __future__ import annotations

import pytest

from simulations import front_page

TEXT = front_page.README.read_text()


def curves(seeds=2):
    lines = [{"round": i, "test_accuracy": 0.1 * i, "epsilon": float(i)} for i in range(5)]
    return {cell: [lines] * seeds for cell in front_page.CELLS}


def test_the_readme_states_each_cell():
    assert list(front_page.stated(TEXT)) == list(front_page.CELLS)


def test_a_figure_that_is_off_is_named():
    said = front_page.stated(TEXT)
    assert front_page.problem({cell: [value + 1] for cell, value in said.items()}, TEXT) is None
    found = {**{cell: [value] for cell, value in said.items()}, "3": [said["3"] - 5]}
    assert front_page.problem(found, TEXT).startswith(f"epsilon 3: README.md says {said['3']:.1f} %")


def test_the_table_says_what_was_measured():
    written = front_page.table(front_page.accuracies(curves()), "2026-01-02")
    assert "| test accuracy | 40.0 % ± 0.0 |" in written
    assert written.endswith("Mean of 2 seeds with its 95 % interval, measured on 2026-01-02.\n")
    assert front_page.stated(f"{front_page.BEGIN}{written}{front_page.END}") == dict.fromkeys(front_page.CELLS, 40.0)


def test_the_picture_is_drawn(tmp_path):
    front_page.draw(curves(), tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    for words in ("epsilon 1", "without privacy", "epsilon spent (maximum over clients, PLD)"):
        assert words in text


@pytest.mark.slow
def test_the_readme_holds():
    assert front_page.problem(front_page.accuracies(front_page.measured([0])), TEXT) is None
