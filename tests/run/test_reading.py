from __future__ import annotations

import json
import math
import shutil

import pytest

from fed_dpsat.errors import InputError
from fed_dpsat.run.reading import load_run
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading") / "run"
    simulate(RunConfig(num_clients=4, num_rounds=3, target_epsilon=3.0, delta=1e-4, lr=8.0), folder)
    return folder


@pytest.fixture
def copy(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_is_read_whole(run_folder):
    run = load_run(run_folder)
    assert (run.status, run.missing, len(run.rounds), run.num_test) == ("completed", (), 4, 360)
    assert run.epsilon == json.loads((run_folder / "summary.json").read_text())["epsilon"]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("rounds.jsonl", "{\n", "rounds.jsonl, line 1 is damaged"),
        ("rounds.jsonl", '{"round": 0}\n', "line 1 is damaged"),
        ("summary.json", "[1]", "summary.json is damaged"),
        ("quality.json", "{", "quality.json is damaged"),
        ("config.toml", "lr = [", "config.toml cannot be read"),
        ("config.toml", "from_the_future = 1", "config.toml cannot be read"),
    ],
)
def test_damage_is_named(copy, file, text, words):
    (copy / file).write_text(text)
    with pytest.raises(InputError, match=words):
        load_run(copy)


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="it does not exist"):
        load_run(tmp_path / "nothing")
    with pytest.raises(InputError, match="has no config"):
        load_run(tmp_path)


def test_a_killed_run_has_the_epsilon_of_its_ledger_not_of_its_last_line(copy):
    whole = load_run(copy).epsilon
    (copy / "summary.json").unlink()
    lines = (copy / "rounds.jsonl").read_text().splitlines(keepends=True)
    (copy / "rounds.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    run = load_run(copy)
    assert run.status == "unfinished"
    assert [line["round"] for line in run.rounds] == [0, 1, 2]
    assert "is incomplete" in " ".join(run.missing)
    assert run.rounds[-1]["epsilon"] < run.epsilon == whole


def test_without_ledger_and_summary_epsilon_is_unknown(copy):
    (copy / "summary.json").unlink()
    (copy / "ledger.sqlite").unlink()
    assert math.isnan(load_run(copy).epsilon)


def test_a_damaged_ledger_of_a_run_without_a_summary_is_bad_input(copy):
    (copy / "summary.json").unlink()
    (copy / "ledger.sqlite").write_bytes(b"no ledger")
    with pytest.raises(InputError, match="ledger"):
        load_run(copy)
