"""Devices die, come back and come back by other nodes: the federation goes on, and who they are does not change."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.flower.roster import Roster, draw_cohort
from fed_dpsat.flower.strategy import PrivateStrategy
from fed_dpsat.flower.wire import compat, records

LEAST_ID = 100


class Net(Grid):
    """A network as Flower shows it: ids by node, and errors of node 1 for who is gone."""

    def __init__(self, app) -> None:
        compat.identify_process()
        self.app = app
        self.ids = itertools.count(1)
        self.nodes: dict[int, int] = {}  # node id to partition
        self.dead: set[int] = set()
        self.absent: set[int] = set()
        self.questions: list[int] = []

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def get_node_ids(self):
        return [node for node in self.nodes if node not in self.absent]

    def send_and_receive(self, messages, *, timeout=None):
        return [self.answer(message) for message in messages]

    def answer(self, message):
        compat.set_message_id(message, f"message {next(self.ids)}")
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "query":
            self.questions.append(node)
        if node in self.dead:
            reply = Message(Error(compat.ErrorCode.NODE_UNAVAILABLE, "node gone"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = compat.SERVER_NODE_ID
            return reply
        context = Context(1, node, {"partition-id": self.nodes[node]}, RecordDict(), {})
        return self.app(message, context)


@pytest.fixture
def net(make_client_app):
    grid = Net(make_client_app())
    grid.nodes = {LEAST_ID + partition: partition for partition in range(4)}
    return grid


@pytest.fixture
def go(net, ledger, make_plans):
    """``go(rounds, at)`` runs a federation in which ``at[round]()`` happens before a round; its reports."""

    def run(rounds, at, **settings):
        defaults = {"cohort_size": 4, "join_timeout": 0.0, "seed": 0, **settings}
        join_timeout = defaults.pop("join_timeout")
        roster = Roster(make_plans(), ledger, delta=1e-5, accountant="pld", max_rounds_per_client=100, **defaults)
        strategy = PrivateStrategy(FedAvg(), roster, join_timeout=join_timeout)
        reports = {}

        def note(round, arrays):
            reports[round] = strategy.report
            at.get(round + 1, lambda: None)()

        strategy.start(net, records.to_arrays({"w": torch.zeros(2)}), rounds, evaluate_fn=note)
        return reports

    return run


def test_a_dead_node_is_known_by_the_message_it_did_not_answer(net, go):
    reports = go(1, {1: lambda: net.dead.add(LEAST_ID + 2)})
    assert reports[1].dropped == {2: "failed: node gone"}
    assert reports[1].accepted == [0, 1, 3]
    assert reports[1].unexpected == []


def test_who_is_gone_is_not_asked_and_its_place_is_filled(net, go):
    reports = go(8, {3: lambda: net.absent.add(LEAST_ID + 2)}, cohort_size=2)
    assert any(2 in draw_cohort(0, round, np.arange(4), 2) for round in range(3, 9))  # it would have been
    later = [reports[round].asked for round in range(3, 9)]
    assert all(2 not in asked and len(asked) == 2 for asked in later)


def test_a_node_that_returns_keeps_its_history(net, go, ledger):
    reports = go(3, {2: lambda: net.absent.add(LEAST_ID), 3: lambda: net.absent.discard(LEAST_ID)})
    assert [0 in reports[round].asked for round in (1, 2, 3)] == [True, False, True]
    assert ledger.rounds_by_client() == {0: 2, 1: 3, 2: 3, 3: 3}


def test_a_client_that_returns_by_another_node_is_the_same_client(net, go, ledger):
    def move():
        net.absent.add(LEAST_ID)
        net.nodes[7] = 0

    reports = go(3, {2: move})
    assert all(reports[round].accepted == [0, 1, 2, 3] for round in (1, 2, 3))
    assert ledger.rounds_by_client() == dict.fromkeys(range(4), 3)
    assert net.questions.count(7) == 1  # it is asked once who it is


def test_a_node_that_claims_a_client_that_is_there_is_not_believed(net, go):
    reports = go(2, {2: lambda: net.nodes.update({7: 0})})
    assert reports[2].accepted == [0, 1, 2, 3]


def test_all_nodes_dying_in_one_round_is_no_reason_to_end(net, go):
    reports = go(2, {1: lambda: net.dead.update(net.nodes), 2: net.dead.clear})
    assert reports[1].accepted == []
    assert reports[2].accepted == [0, 1, 2, 3]


def test_too_few_that_stay_away_end_the_run_in_words(net, go):
    with pytest.raises(FederationError, match="1 clients are connected, fewer than min_clients=2"):
        go(2, {2: lambda: net.absent.update(list(net.nodes)[:3])}, min_clients=2)
