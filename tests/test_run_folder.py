from __future__ import annotations

import json
import math

import pytest
import torch

from fed_dpsat.config import RunConfig
from fed_dpsat.errors import SettingError
from fed_dpsat.run_folder import Checkpoint, RunFolder, jsonable


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(SettingError, match=r"new or an empty folder.*--out"):
        RunFolder(tmp_path)


def test_nothing_is_written_before_it_is_opened(tmp_path):
    RunFolder(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_written_can_be_read(tmp_path):
    folder = RunFolder(tmp_path / "run")
    config = RunConfig(target_epsilon=3.0)
    folder.open(config)
    assert RunConfig.load(tmp_path / "run" / "config.toml") == config
    for number in range(3):
        folder.append_round({"round": number, "epsilon": math.inf}, {"round": number, "seconds": 0.1})
        lines = (tmp_path / "run" / "rounds.jsonl").read_text()
        assert lines.endswith("\n")
        assert [json.loads(line)["round"] for line in lines.splitlines()] == list(range(number + 1))
    folder.save_checkpoint(Checkpoint(round=2, params={"w": torch.ones(2)}, server={"seen": [1]}))
    loaded = torch.load(folder.checkpoint_path, weights_only=True)
    assert loaded["round"] == 2
    assert torch.equal(loaded["params"]["w"], torch.ones(2))
    folder.close({"epsilon": math.inf})
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"epsilon": "inf"}
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["device"] == "cpu"
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"]


def test_what_json_cannot_hold_becomes_text():
    assert jsonable({1: [math.inf, 0.5, (math.nan,)]}) == {"1": ["inf", 0.5, ["nan"]]}


def test_rounds_are_read_back_without_a_line_that_was_cut_short(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.rounds() == []
    folder.append_round({"round": 0, "epsilon": float("inf")}, {"round": 0})
    (tmp_path / "rounds.jsonl").open("a").write('{"round": 1, "eps')
    assert folder.rounds() == [{"round": 0, "epsilon": "inf"}]
