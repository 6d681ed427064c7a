"""Clients' states: the last two rounds of each are there, by name, also for another process."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fed_dpsat.flower.wire import records
from fed_dpsat.simulation import state
from fed_dpsat.simulation.state import StateError, StateStore, kept_rounds


def made_in(round):
    return RecordDict(
        {
            "arrays": records.to_arrays({"w": torch.full((3,), float(round)), "step": torch.tensor(round)}),
            "config": ConfigRecord({"events": ["a", "b"], "round": round}),
            "metrics": MetricRecord({"seen": [1, 2]}),
        }
    )


def test_another_process_reads_what_one_wrote(tmp_path):
    StateStore(tmp_path).save(7, 3, made_in(3), before=None)
    assert StateStore(tmp_path).load(7, 3) == made_in(3)


def test_the_round_before_stays_and_older_ones_go(tmp_path):
    store, before = StateStore(tmp_path), None
    for round in (1, 4, 9):
        store.save(7, round, made_in(round), before)
        before = round
    fresh = StateStore(tmp_path)
    assert [fresh.load(7, round)["config"]["round"] for round in (4, 9)] == [4, 9]
    with pytest.raises(StateError, match="disk that all hosts share"):
        fresh.load(7, 1)


def test_a_round_that_is_done_again_starts_from_the_one_before(tmp_path):
    store = StateStore(tmp_path)
    store.save(7, 1, made_in(1), before=None)
    store.save(7, 2, made_in(2), before=1)
    assert store.load(7, 1) == made_in(1)
    store.save(7, 2, made_in(2), before=1)
    assert StateStore(tmp_path).load(7, 1) == made_in(1)


def test_what_a_client_does_to_its_state_is_kept_only_if_it_is_saved(tmp_path):
    store = StateStore(None)
    store.save(7, 1, made_in(1), before=None)
    del store.load(7, 1)["config"]
    assert store.load(7, 1) == made_in(1)
    assert store.load(8, None) == RecordDict()


def test_what_was_kept_up_to_a_round_is_found(tmp_path):
    store = StateStore(tmp_path)
    for client, rounds in {0: (1, 2), 1: (2, 5), 2: (6,)}.items():
        before = None
        for round in rounds:
            store.save(client, round, made_in(round), before)
            before = round
    (tmp_path / "0" / "9.tmp").touch()  # of a process that was killed while it wrote
    assert kept_rounds(tmp_path, up_to=5) == {0: 2, 1: 5}
    assert kept_rounds(tmp_path, up_to=4) == {0: 2, 1: 2}
    assert kept_rounds(tmp_path / "none", up_to=4) == {}


def test_memory_is_bounded_where_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "REMEMBERED_BYTES", 50)
    store = StateStore(tmp_path)
    for client in range(5):
        store.save(client, 1, made_in(1), before=None)
    assert len(store._remembered) < 5
    assert all(store.load(client, 1) == made_in(1) for client in range(5))


def test_states_of_an_older_version_are_refused_and_not_forgotten(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "2.pt").touch()
    with pytest.raises(StateError, match="older version"):
        kept_rounds(tmp_path, up_to=5)
