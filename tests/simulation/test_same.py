"""Whoever builds a run from its names builds the same one: else clients share examples, and nobody is asked."""

from __future__ import annotations

import dataclasses

import pytest
from flwr.app import Message, MessageType, RecordDict

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.flower.client_app import app, make_client_app
from fed_dpsat.flower.grid import FIRST_NODE_ID, SimulationGrid, answer, node_context
from fed_dpsat.flower.nodes import FederationError, identify_nodes
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import resume, simulate
from fed_dpsat.simulation.in_process import InProcessBackend

PLUGINS = """
import numpy as np
import torch
from torch import nn

from fed_dpsat.data.digits import digits

def partition(labels, num_clients):  # another one each time, for want of the seed
    return np.array_split(np.random.default_rng().permutation(len(labels)), num_clients)

def data():
    whole = digits()
    shuffled = torch.from_numpy(np.random.default_rng().permutation(len(whole.train)))
    return type(whole)(
        name="shuffled",
        train=type(whole.train)(
            inputs=whole.train.inputs[shuffled], labels=whole.train.labels[shuffled], mean=(0.0,), std=(1.0,)
        ),
        test=whole.test,
        class_names=whole.class_names,
    )

def model(num_classes):
    frozen, head = nn.Linear(64, 8), nn.Linear(8, num_classes)
    nn.init.constant_(frozen.bias, float(np.random.default_rng().random()))
    return nn.Sequential(nn.Flatten(), frozen, nn.Tanh(), head)
"""
CONFIG = RunConfig(noise_multiplier=1.0, num_clients=3, num_rounds=2)


@pytest.fixture(params=["partition", "dataset", "model"])
def config(request, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGINS)
    name = "data" if request.param == "dataset" else request.param
    frozen = {"train_layers": "head"} if request.param == "model" else {}
    return dataclasses.replace(CONFIG, **{request.param: f"{tmp_path / 'mine.py'}:{name}"}, **frozen)


@pytest.mark.slow
def test_workers_that_build_another_run_end_it_before_anything_is_charged(tmp_path, ray_cluster):
    (tmp_path / "mine.py").write_text(PLUGINS)
    config = dataclasses.replace(CONFIG, partition=f"{tmp_path / 'mine.py'}:partition", workers=1)
    with pytest.raises(RunError, match=r"a worker on .*: this process made other data, another partition"):
        simulate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


def test_a_client_of_another_run_than_the_servers_says_so_and_computes_nothing(config):
    server, asked = Experiment.build(config), {**records.same_content(Experiment.build(config).same)}
    compat.identify_process()
    context = node_context(FIRST_NODE_ID, config.settings(), 3)
    assignment = records.assignment_record(
        Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1))
    )
    trained = RecordDict({records.ARRAYS: records.to_arrays(server.shared(1)), records.ASSIGNMENT: assignment, **asked})
    own = make_client_app(lambda _: server)
    for content, kind in ((RecordDict(asked), MessageType.QUERY), (trained, MessageType.TRAIN)):
        reply = answer(own, Message(content, context.node_id, kind), context)
        assert "made other data, another partition or other frozen weights" in reply.error.reason
    assert not context.state
    same = RecordDict({**trained, **records.same_content(server.same)})
    assert answer(own, Message(same, context.node_id, MessageType.TRAIN), context).has_content()


def test_a_server_leaves_out_nodes_with_another_run(config):
    """Of ``flwr run``: each process builds its own."""
    grid = SimulationGrid(InProcessBackend(app, config.settings(), 3), 3)
    with pytest.raises(FederationError, match=r"0 of 3 clients joined.*made other data, another partition"):
        identify_nodes(grid, 3, 0.0, Experiment.build(config).same)
    assert len(identify_nodes(grid, 3, 0.0)) == 3


def stop_after_one(line):
    if line["round"] == 1:
        raise KeyboardInterrupt


def test_a_run_is_not_resumed_with_other_clients_data_or_weights(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", on_round=stop_after_one)
    with pytest.raises(SettingError, match=r"has changed since .*run began"):
        resume(tmp_path / "run")
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite") as ledger:
        assert ledger.head.charges == 3
