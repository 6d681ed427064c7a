"""The table of stacked states: two rows a client, found by another process, never a torn one."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.errors import RunError
from fed_dpsat.flower.wire.records import Kept
from fed_dpsat.run.state_file import StateError
from fed_dpsat.simulation.state import StateStore, kept_rounds
from fed_dpsat.simulation.state_table import EVENTS, ROWS, Form, StateTable

EVENT = PrivacyEvent(noise_multiplier=1.25, sample_rate=0.1, steps=3)
OTHER = PrivacyEvent(noise_multiplier=0.75, sample_rate=0.1, steps=5, kind="poisson_laplace")


def made(clients, round, dtype=torch.float32):
    """A state of its own for each client and round, with an empty tree and a number."""
    rows = [torch.arange(6, dtype=dtype).view(2, 3) + 10 * client + round / 8 for client in clients]
    return {
        "optimizer": {
            "last": {"a/b": torch.stack(rows)},
            "steps": torch.tensor([client + round for client in clients]),
            "base": {},
        }
    }


def saved(store, clients, round, since, histories=None):
    store.save_stack(clients, round, made(clients, round), histories or [(EVENT,)] * len(clients), since)
    since |= dict.fromkeys(clients, round)


def assert_kept(store, client, round, history=(EVENT,)):
    found, expected = store.load_kept(client, round), made([client], round)["optimizer"]
    assert found.history == history
    assert found.state["optimizer"]["base"] == {}
    assert torch.equal(found.state["optimizer"]["last"]["a/b"], expected["last"]["a/b"][0])
    assert torch.equal(found.state["optimizer"]["steps"], expected["steps"][0])


@pytest.mark.parametrize("clients", [[0, 1, 2, 3], [7, 2, 9, 8], [5]])
def test_another_process_finds_the_last_two_rounds_of_each(clients, tmp_path):
    store, since = StateStore(tmp_path), {}
    for round in (1, 4, 5, 9):
        saved(store, clients, round, since)
    fresh = StateStore(tmp_path)
    for client in clients:
        assert_kept(fresh, client, 5)
        assert_kept(fresh, client, 9)
        with pytest.raises(StateError):
            fresh.load_kept(client, 4)


def test_stacks_of_other_clients_each_round_keep_the_round_before_of_each(tmp_path):
    generator, since, history = np.random.default_rng(0), {}, {}
    stores = [StateStore(tmp_path), StateStore(tmp_path)]  # two workers, and a client goes from one to the other
    for round in range(1, 30):
        cohort = generator.permutation(12)[:6].tolist()
        for worker, stack in enumerate((cohort[:3], cohort[3:])):
            before = {client: since[client] for client in stack if client in since}
            for client, last in before.items():
                assert_kept(stores[worker], client, last)
            saved(stores[worker], stack, round, since)
            for client in stack:
                history[client] = [*history.get(client, []), round]
    fresh = StateStore(tmp_path)
    for client, rounds in history.items():
        for round in rounds[-2:]:
            assert_kept(fresh, client, round)
    assert kept_rounds(tmp_path, up_to=29) == since


def test_rounds_after_the_checkpoint_are_left_out(tmp_path):
    store, since = StateStore(tmp_path), {}
    saved(store, [0, 1, 2], 1, since)
    saved(store, [1, 2], 3, since)
    saved(store, [2], 4, since)
    assert kept_rounds(tmp_path, up_to=4) == {0: 1, 1: 3, 2: 4}
    assert kept_rounds(tmp_path, up_to=3) == {0: 1, 1: 3, 2: 3}
    assert kept_rounds(tmp_path, up_to=2) == {0: 1, 1: 1}
    assert kept_rounds(tmp_path, up_to=0) == {}


def test_a_round_done_again_writes_over_itself_and_not_over_the_one_before(tmp_path):
    store, since = StateStore(tmp_path), {}
    saved(store, [0, 1], 1, since)
    saved(store, [0, 1], 2, since)
    again = StateStore(tmp_path)  # of a resumed run, whose checkpoint is that of round 1
    saved(again, [0, 1], 2, {0: 1, 1: 1})
    for round in (1, 2):
        assert_kept(StateStore(tmp_path), 0, round)


def test_a_row_that_a_killed_process_began_is_none(tmp_path):
    """Pages of one write get to the file one by one."""
    saved(StateStore(tmp_path), [0, 1], 1, {})
    path = next(path for path in tmp_path.glob(f"*{ROWS}"))
    os.truncate(path, path.stat().st_size - 10)
    assert kept_rounds(tmp_path, up_to=1) == {0: 1}
    os.truncate(path, 10)
    assert kept_rounds(tmp_path, up_to=1) == {}


def test_a_state_alone_goes_on_in_a_stack_and_back(tmp_path):
    store = StateStore(tmp_path)
    alone = Kept(made([3], 1)["optimizer"], (EVENT,))
    store.save(3, 1, alone.content(), None)
    saved(store, [2, 3], 2, {3: 1})
    store.save(3, 4, StateStore(tmp_path).load(3, 2), 2)
    fresh = StateStore(tmp_path)
    assert_kept(fresh, 3, 2)
    assert fresh.load_kept(3, 4).history == (EVENT,)
    assert kept_rounds(tmp_path, up_to=9) == {2: 2, 3: 4}


def test_a_round_done_again_in_a_stack_replaces_the_file_of_a_client_that_was_alone(tmp_path):
    alone = Kept(made([4], 2)["optimizer"], (EVENT,))
    StateStore(tmp_path).save(3, 2, alone.content(), None)
    saved(StateStore(tmp_path), [2, 3], 2, {})
    assert_kept(StateStore(tmp_path), 3, 2)


@pytest.mark.parametrize("history", [(), (EVENT,), (EVENT, OTHER)])
def test_the_history_of_each_client_comes_back(history, tmp_path):
    saved(StateStore(tmp_path), [0, 1], 1, {}, [history, (EVENT,)])
    assert_kept(StateStore(tmp_path), 0, 1, history)
    assert_kept(StateStore(tmp_path), 1, 1)


def test_a_longer_history_has_a_file(tmp_path):
    events = [PrivacyEvent(noise_multiplier=1.0 + i, sample_rate=0.1, steps=1) for i in range(EVENTS + 1)]
    saved(StateStore(tmp_path), [0], 1, {}, [tuple(events)])
    assert (tmp_path / "0" / "1.state").exists()
    assert_kept(StateStore(tmp_path), 0, 1, tuple(events))


@pytest.mark.parametrize("place", ["arrays", "end"])
def test_a_damaged_row_is_found(place, tmp_path):
    clients = [0, 1]
    saved(StateStore(tmp_path), clients, 1, {})
    path = next(path for path in tmp_path.glob(f"*{ROWS}"))
    data = bytearray(path.read_bytes())
    data[-60 if place == "arrays" else -1] ^= 1  # the last bytes are padding
    path.write_bytes(data)
    assert_kept(StateStore(tmp_path), 0, 1)
    with pytest.raises(StateError, match="client 1 is damaged"):
        StateStore(tmp_path).load_kept(1, 1)


def test_a_full_disk_ends_in_words(tmp_path, full_disk):
    store, since = StateStore(tmp_path), {}
    saved(store, [0], 1, since)
    with full_disk(100), pytest.raises(RunError, match="free space"):
        saved(store, [0], 2, since)
    assert_kept(StateStore(tmp_path), 0, 1)


def test_files_of_a_few_clients_among_many_take_no_more_than_their_rows(tmp_path):
    saved(StateStore(tmp_path), [10**6, 10**6 + 1], 1, {})
    path = next(path for path in tmp_path.glob(f"*{ROWS}"))
    assert path.stat().st_size > 10**8
    assert path.stat().st_blocks * 512 < 10**5
    assert kept_rounds(tmp_path, up_to=1) == {10**6: 1, 10**6 + 1: 1}


def test_forms_have_tables_of_their_own(tmp_path):
    store = StateStore(tmp_path)
    saved(store, [0], 1, {})
    store.save_stack([0], 2, made([0], 2, torch.float64), [(EVENT,)], {0: 1})
    assert {table.form.arrays[0][1] for table in StateTable.all_in(tmp_path)} == {"<f4", "<f8"}
    assert StateStore(tmp_path).load_kept(0, 2).state["optimizer"]["last"]["a/b"].dtype == torch.float64
    assert_kept(StateStore(tmp_path), 0, 1)
    assert kept_rounds(tmp_path, up_to=2) == {0: 2}


def test_a_form_that_is_being_written_is_no_table(tmp_path):
    table = StateTable(tmp_path, Form((("w", "<f4", (2,)),)))
    table.write([0], 1, [None], {"w": np.ones((1, 2), np.float32)}, [(EVENT,)])
    (tmp_path / f"{table.form.name}.{os.getpid()}").write_text("[[")
    assert len(StateTable.all_in(tmp_path)) == 1
