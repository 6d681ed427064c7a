"""What crosses the wire: exactly what the table in records.py lists, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from fed_dpsat.accounting.event import PrivacyEvent, merge
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.flower.wire import records
from fed_dpsat.flower.wire.records import RecordError
from fed_dpsat.step.loop import LocalResult

PARAMS = {"weight": torch.tensor([[1.5, -2.0]]), "scale": torch.tensor(3.0), "count": torch.tensor(7)}
EVENT = PrivacyEvent(noise_multiplier=1.5, sample_rate=0.25, steps=3)
ASSIGNMENT = Assignment(round=4, event=PrivacyEvent(noise_multiplier=1.5, sample_rate=0.25, steps=3))


def reply():
    secret = {"momentum": {"weight": torch.tensor([[9.0, 9.0]])}}
    result = LocalResult(params=PARAMS, state=secret, event=EVENT, nonfinite_examples=13)
    return records.reply_content(2, ASSIGNMENT, result, num_examples=50)


def test_nothing_leaves_a_client_but_parameters_event_and_public_size():
    content = reply()
    assert set(content) == {records.ARRAYS, records.EVENT, records.METRICS}
    assert set(content[records.ARRAYS]) == set(PARAMS)
    assert dict(content[records.METRICS]) == {"num-examples": 50}
    assert dict(content[records.EVENT]) == {
        "client": 2, "round": 4, "attempt": 0,
        "kind": "poisson_gaussian", "noise_multiplier": 1.5, "sample_rate": 0.25, "steps": 3,
    }  # fmt: skip


def test_parameters_survive_with_shape_and_type():
    back = records.to_params(records.to_arrays(PARAMS))
    for name, value in PARAMS.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert torch.equal(back[name], value)


def test_event_survives():
    assert records.read_event(reply()) == (2, 4, 0, EVENT)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"sample_rate": 1.5},
        {"kind": "magic"},
        {"surprise": 1},
    ],
)
def test_an_event_that_makes_no_sense_is_refused(change):
    content = reply()
    content[records.EVENT].update(change)
    with pytest.raises(RecordError, match="event"):
        records.read_event(content)


def test_task_survives_and_an_unknown_key_is_refused():
    content = RecordDict({records.ASSIGNMENT: records.assignment_record(ASSIGNMENT)})
    assert records.read_assignment(content) == ASSIGNMENT
    content[records.ASSIGNMENT]["seed"] = 1
    with pytest.raises(RecordError, match="seed"):
        records.read_assignment(content)
    with pytest.raises(RecordError, match="no"):
        records.read_assignment(RecordDict({"x": ConfigRecord()}))


def test_state_is_kept_whole():
    kept = RecordDict()
    assert records.load_state(kept) is None
    state = {"count": torch.tensor(5), "base": {}, "a/b": {"~1": {"0.weight": torch.tensor([1.0, 2.0])}}}
    records.save_state(kept, state)
    back = records.load_state(kept)
    assert back.keys() == state.keys()
    assert torch.equal(back["a/b"]["~1"]["0.weight"], state["a/b"]["~1"]["0.weight"])
    assert int(back["count"]) == 5


def test_a_clients_own_count_is_kept():
    kept = RecordDict()
    assert records.load_history(kept) == ()
    history = merge([EVENT, EVENT, dataclasses.replace(EVENT, noise_multiplier=2.0)])
    records.save_history(kept, history)
    assert records.load_history(kept) == history


@pytest.mark.parametrize(
    ("value", "what"),
    [(float("nan"), "NaN or inf"), (-float("inf"), "NaN or inf"), (-2e14, "beyond 1e"), (2e14, "beyond 1e")],
)
def test_numbers_that_would_spread_are_none(value, what):
    like = records.to_arrays({"w": torch.zeros(2)})
    records.check_arrays(RecordDict({records.ARRAYS: records.to_arrays({"w": torch.tensor([1e14, -1e14])})}), like)
    spoiled = RecordDict({records.ARRAYS: records.to_arrays({"w": torch.tensor([0.0, value])})})
    with pytest.raises(RecordError, match=what):
        records.check_arrays(spoiled, like)


def test_a_number_that_float16_does_not_have_is_told():
    like = records.to_arrays({"w": torch.zeros(2, dtype=torch.float16)})
    spoiled = RecordDict({records.ARRAYS: records.to_arrays({"w": torch.tensor([1.0, math.inf], dtype=torch.float16)})})
    with pytest.raises(RecordError, match="NaN or inf"):
        records.check_arrays(spoiled, like)
    kept = RecordDict({records.ARRAYS: records.to_arrays({"w": torch.tensor([6e4, -6e4], dtype=torch.float16)})})
    records.check_arrays(kept, like)


def test_numbers_without_an_order_are_none():
    like = records.to_arrays({"w": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(RecordError, match="complex64 numbers"):
        records.check_arrays(RecordDict({records.ARRAYS: like}), like)
