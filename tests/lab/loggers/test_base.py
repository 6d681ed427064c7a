"""What leaves by a logger is what the run folder holds, and of that the built-in ones send numbers and settings."""

from __future__ import annotations

import json

from fed_dpsat.lab.loggers import public_settings, scalars
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import MACHINE, RunConfig


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(value):
    """Every number in ``value``, and the size of every collection."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return {float(len(value))}.union(*(numbers(part) for part in parts))
    return {float(value)} if isinstance(value, int | float) else set()


def test_a_logger_gets_the_lines_of_the_run_folder_and_nothing_else(run, spy):
    folder = run(f"{spy}:spy")
    begin, *rounds, end = spy.calls()
    assert begin == ("begin", begin[1], folder, 0)
    assert begin[1].settings() == {**RunFolder(folder, resume=True).config().settings(), **machine(begin[1])}
    assert [name for name, _ in rounds] == ["round"] * 4
    assert [{k: v for k, v in record.items() if k != "timing"} for _, record in rounds] == lines(
        folder / "rounds.jsonl"
    )
    assert [record["timing"] for _, record in rounds] == lines(folder / "timing.jsonl")
    assert end == ("end", json.loads((folder / "summary.json").read_text()))


def machine(config):
    return {name: getattr(config, name) for name in MACHINE}


def test_what_the_built_in_ones_send_of_a_round_is_in_its_lines(run, spy):
    folder = run(f"{spy}:spy")
    for (_, record), line, timing in zip(
        spy.calls()[1:-1], lines(folder / "rounds.jsonl"), lines(folder / "timing.jsonl"), strict=True
    ):
        assert line["released"] or not line["asked"]  # there are counts that epsilon does not cover
        sent = scalars(record)
        assert set(sent.values()) <= numbers({k: v for k, v in line.items() if k != "released"}) | numbers(timing)
        assert not any("released" in name or "nonfinite" in name for name in sent)


def test_scalars_are_finite_numbers_and_counts():
    record = {
        "round": 3, "test_accuracy": None, "test_auroc": "undefined", "test_loss": "nan", "epsilon": "inf",
        "asked": [4, 5, 6], "accepted": 2,
        "dropped": {"5": "failed: secret words"}, "unexpected": ["x"], "retired": {}, "released": {"4": {"n": 7}},
        "kept_model": False, "timing": {"round": 3, "seconds": 1.5, "phases": {"train": 1.0}},
    }  # fmt: skip
    assert scalars(record) == {
        "clients/asked": 3.0, "clients/accepted": 2.0, "clients/dropped": 1.0, "clients/retired": 0.0,
        "timing/seconds": 1.5, "timing/phases/train": 1.0,
    }  # fmt: skip


def test_settings_that_say_where_are_not_sent():
    config = RunConfig(noise_multiplier=1.0, data_path="/secret/data", cache_dir="/secret/cache", out="/secret/out",
                       model="/secret/net.py:make", base_optimizer="disk+/secret/o.py:make")  # fmt: skip
    sent = public_settings(config)
    assert "secret" not in json.dumps(sent)
    assert sent["noise_multiplier"] == 1.0
    assert (sent["model"], sent["base_optimizer"]) == ("net.py:make", "disk+o.py:make")
    assert sent.keys() >= {"seed", "delta", "optimizer", "rho"}
