"""The simulation grid: one reply per message, a client's exception is an answer, state stays with the node."""

from __future__ import annotations

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fed_dpsat.flower.grid import FIRST_NODE_ID, SimulationGrid
from fed_dpsat.flower.wire import records
from fed_dpsat.simulation.in_process import InProcessBackend


def counting_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        if partition == 1:
            raise ValueError("out of memory, say")
        state = records.load_state(context.state) or {"seen": {"times": torch.tensor(0)}}
        records.save_state(context.state, {"seen": {"times": state["seen"]["times"] + 1}})
        return Message(RecordDict({"seen": context.state[records.STATE]}), reply_to=message)

    return app


def make_grid() -> SimulationGrid:
    return SimulationGrid(InProcessBackend(counting_app(), {"key": 1}, 3), 3)


def ask(grid: SimulationGrid) -> list[Message]:
    nodes = list(grid.get_node_ids())
    return list(grid.send_and_receive(Message(RecordDict(), node, MessageType.TRAIN) for node in nodes))


def test_one_reply_per_message_and_an_exception_is_one():
    replies = ask(make_grid())
    assert [r.metadata.src_node_id for r in replies] == [FIRST_NODE_ID, FIRST_NODE_ID + 1, FIRST_NODE_ID + 2]
    assert [r.has_error() for r in replies] == [False, True, False]
    assert "ValueError: out of memory, say" in replies[1].error.reason


def test_a_nodes_state_lives_from_round_to_round():
    grid = make_grid()
    ask(grid)
    assert int(ask(grid)[0].content["seen"]["seen/times"].numpy()) == 2


def test_push_and_pull_give_each_reply_once():
    grid = make_grid()
    message = grid.create_message(RecordDict(), MessageType.TRAIN, FIRST_NODE_ID, "1")
    ids = list(grid.push_messages([message]))
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages(ids)] == ids
    assert list(grid.pull_messages(ids)) == []
