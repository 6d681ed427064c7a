from __future__ import annotations

import json

from fed_dpsat.report.curves import draw_curves, read_run


def make_run(folder):
    folder.mkdir()
    summary = {"dataset": "digits", "optimizer": "dp-sat", "num_clients": 2, "seed": 0, "epsilon": 1.0, "delta": 1e-5}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [{"round": r, "test_accuracy": [0.1, None, 0.5][r], "epsilon": r / 2} for r in range(3)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rounds_that_were_not_evaluated_are_left_out(tmp_path):
    assert [row["round"] for row in read_run(make_run(tmp_path / "run"))[1]] == [0, 2]


def test_the_figure_says_what_was_measured(tmp_path):
    draw_curves([make_run(tmp_path / "run")], tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().count("<path") > 10
