from __future__ import annotations

from fed_dpsat.lab.report.reading import read_run
from simulations.curves_figure import draw_curves


def test_the_figure_says_what_was_measured(run_folder, tmp_path):
    draw_curves([run_folder, run_folder], tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    for words in ("digits, dp-sat, 4 clients, seed 0", "epsilon spent (maximum over clients, PLD)", "at (3, 0.0001)"):
        assert words in text
    assert f"{100 * read_run(run_folder).score:.1f} %" in text
