"""When the range of flwr in pyproject.toml is raised, this says which internal broke."""

from __future__ import annotations

import inspect

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fed_dpsat.flower import compat


def test_a_process_can_say_who_it_is_and_create_messages():
    compat.identify_process(run_id=7, node_id=8)
    message = Message(RecordDict(), 9, MessageType.TRAIN)
    assert (message.metadata.run_id, message.metadata.src_node_id) == (7, 8)
    compat.identify_process()


def test_a_message_id_can_be_set_and_is_what_a_reply_refers_to():
    compat.identify_process()
    message = Message(RecordDict(), 9, MessageType.TRAIN)
    compat.set_message_id(message, "42")
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "42"


def test_a_run_can_be_empty():
    assert compat.empty_run().run_id == compat.SIMULATION_RUN_ID


def test_error_codes_are_there():
    assert {compat.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, compat.ErrorCode.NODE_UNAVAILABLE} == {2, 5}


def test_the_grid_and_the_strategy_have_the_methods_that_are_implemented():
    assert Grid.__abstractmethods__ == {
        "set_run", "run", "create_message", "get_node_ids", "push_messages", "pull_messages", "send_and_receive",
    }  # fmt: skip
    assert Strategy.__abstractmethods__ == {
        "configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate", "summary",
    }  # fmt: skip


def test_the_loop_calls_evaluate_fn_before_the_first_and_after_each_round():
    source = inspect.getsource(Strategy.start)
    assert source.count("evaluate_fn(") == 2


def test_stock_strategies_have_the_sampling_settings_that_are_overruled():
    names = {"fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes"}
    assert names <= set(vars(FedAvg()))


def test_a_record_of_arrays_is_the_one_that_is_set_item_by_item():
    arrays = {"b": np.arange(3.0), "a": np.zeros((2, 1), dtype=np.int64)}
    record, expected = compat.record_of(arrays), ArrayRecord()
    for name, array in arrays.items():
        expected[name] = compat.Array(array)
    assert record == expected
    assert list(compat.items(record)) == list(expected.items())
    assert list(record) == ["b", "a"]
    assert record.object_id == expected.object_id
