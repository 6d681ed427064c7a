"""TensorBoard's own reader finds every round once, also where a run was killed and resumed."""

from __future__ import annotations

import json

import pytest

from fed_dpsat.run.loggers import Loggers
from fed_dpsat.simulation import resume

pytest.importorskip("tensorboard")


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def points(folder, name):
    return [(event.step, event.value) for event in read(folder).Scalars(name)]


def tags(folder):
    return read(folder).Tags()["scalars"]


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_round_is_there(run):
    folder = run("tensorboard")
    rounds = lines(folder, "rounds.jsonl")
    assert points(folder, "epsilon") == [(line["round"], pytest.approx(line["epsilon"])) for line in rounds]
    assert [step for step, _ in points(folder, "test_accuracy")] == [0, 2, 3]  # evaluate_every = 2, and the last
    assert [n for _, n in points(folder, "clients/dropped")] == [len(line["dropped"]) for line in rounds]
    assert [s for s, _ in points(folder, "timing/seconds")] == [0, 1, 2, 3]
    named = {"clients", "timing"} | rounds[0].keys() - {"released", "round"}
    assert {tag.partition("/")[0] for tag in tags(folder)} <= named


def test_after_a_resume_every_round_is_there_once(run, monkeypatch, tmp_path):
    note = Loggers._note

    def killed(self, round):
        if round == 2:
            raise KeyboardInterrupt
        note(self, round)

    monkeypatch.setattr(Loggers, "_note", killed)
    with pytest.raises(KeyboardInterrupt):
        run("tensorboard")
    monkeypatch.setattr(Loggers, "_note", note)
    folder = tmp_path / "run"
    assert [step for step, _ in points(folder, "epsilon")] == [0, 1, 2]
    resume(folder)
    rounds = lines(folder, "rounds.jsonl")
    assert points(folder, "epsilon") == [(line["round"], pytest.approx(line["epsilon"])) for line in rounds]
