"""The real handlers: what leaves a client, what stays, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from torch import nn

from fed_dpsat.accounting import PrivacyEvent, epsilon
from fed_dpsat.accounting.event import CLIENTS
from fed_dpsat.client import protocol
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.flower.client_app import app, from_run_config, make_client_app
from fed_dpsat.flower.grid import FIRST_NODE_ID, answer, node_context
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.params import trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.optimizers import DPSGD

CONFIG = RunConfig(noise_multiplier=2.0, delta=1e-4, num_clients=3, target_epsilon=1.5, budget_mode="retire")
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=1))


@pytest.fixture(scope="module")
def experiment():
    return Experiment.build(CONFIG)


@pytest.fixture
def context():
    compat.identify_process()
    return node_context(FIRST_NODE_ID + 1, CONFIG.settings(), 3)


def ask(experiment, context, assignment=ASSIGNMENT, message_type=MessageType.TRAIN, **extra):
    arrays = records.to_arrays(trainable(experiment.loss_fn.module))
    content = RecordDict({records.ARRAYS: arrays, records.ASSIGNMENT: records.assignment_record(assignment), **extra})
    message = Message(content, context.node_id, message_type)
    return answer(make_client_app(lambda _: experiment), message, context)


def test_nothing_leaves_but_what_the_table_in_records_lists(experiment, context):
    content = ask(experiment, context).content
    assert set(content) == {records.ARRAYS, records.EVENT, records.METRICS}
    assert set(content[records.ARRAYS]) == {name for name, _ in experiment.loss_fn.module.named_parameters()}
    assert dict(content[records.METRICS]) == {"num-examples": len(experiment.partitions[1])}
    assert records.read_event(content) == (1, 1, 0, ASSIGNMENT.event)


def test_identity_is_partition_declared_size_and_protocol(experiment, context):
    reply = ask(experiment, context, message_type=MessageType.QUERY)
    size = len(experiment.partitions[1])
    assert dict(reply.content[records.IDENTITY]) == {"client": 1, "num_examples": size, **protocol.stated()}


def test_on_a_network_a_server_without_a_protocol_does_not_learn_who_a_client_is(experiment, context):
    context.run_id = 7
    reply = ask(experiment, context, message_type=MessageType.QUERY)
    assert "the server has fed-dpsat 0.1.0 or older, this client has" in reply.error.reason
    same = records.same_content({"sha256": experiment.fingerprint})
    assert not ask(experiment, context, message_type=MessageType.QUERY, **same).has_error()


def test_a_node_that_cannot_train_does_not_join(context):
    """Asked who it is, before any charge, it tries itself on made-up examples: once, if that goes well."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
    reply = ask(Experiment.build(CONFIG, model=module), context, message_type=MessageType.QUERY)
    assert "gives [4, 9] for inputs [4, 1, 8, 8], not [4, 10]" in reply.error.reason


def test_state_and_its_own_count_stay(experiment, context):
    ask(experiment, context)
    assert records.load_history(context.state) == (ASSIGNMENT.event,)
    assert "ascent" in records.load_state(context.state)["optimizer"]


def test_it_refuses_beyond_its_budget_whatever_the_server_says(experiment, context):
    budget, rounds = CONFIG.target_epsilon, 0
    while (reply := ask(experiment, context, dataclasses.replace(ASSIGNMENT, round=rounds + 1))).has_content():
        rounds += 1
    assert "refused, nothing was computed" in reply.error.reason
    assert (
        epsilon([ASSIGNMENT.event] * rounds, CONFIG.delta)
        <= budget
        < epsilon([ASSIGNMENT.event] * (rounds + 1), CONFIG.delta)
    )
    assert sum(event.steps for event in records.load_history(context.state)) == rounds


def test_less_noise_than_planned_is_charged_as_what_it_is(experiment, context):
    reply = ask(
        experiment,
        context,
        dataclasses.replace(ASSIGNMENT, event=dataclasses.replace(ASSIGNMENT.event, noise_multiplier=0.5)),
    )
    assert "budget=1.5 is below" in reply.error.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_rate": 1.5},
        {"steps": 0},
        {"noise_multiplier": float("nan")},
        {"round": 1.0},
        {"kind": CLIENTS},
        {"kind": CLIENTS, "local_sample_rate": 0.5, "local_steps": 1},
    ],
)
def test_an_assignment_that_makes_no_sense_is_an_error_and_computes_nothing(experiment, context, changes):
    asked = ConfigRecord({**ASSIGNMENT.to_dict(), **changes})
    reply = ask(experiment, context, **{records.ASSIGNMENT: asked})
    assert reply.has_error()
    assert not context.state


def test_an_unknown_key_in_the_assignment_is_refused(experiment, context):
    assignment = ConfigRecord({**ASSIGNMENT.to_dict(), "seed": 7})
    assert "seed" in ask(experiment, context, **{records.ASSIGNMENT: assignment}).error.reason


def test_an_experiment_is_built_once_per_process():
    assert from_run_config(CONFIG.settings()) is from_run_config(CONFIG.settings())


def test_the_app_that_pyproject_names_answers(context):
    message = Message(RecordDict(), context.node_id, MessageType.QUERY)
    assert answer(app, message, context).content[records.IDENTITY]["client"] == 1


def test_the_event_type_is_ours():
    assert isinstance(ASSIGNMENT.event, PrivacyEvent)


def test_a_count_leaves_only_if_one_setting_asks_for_it(experiment, context):
    asked = dataclasses.replace(experiment, config=dataclasses.replace(CONFIG, release_counts=True))
    content = ask(asked, context).content
    assert dict(content[records.METRICS]) == {"num-examples": len(experiment.partitions[1]), "nonfinite-examples": 0}
    records.read_metrics(content, release_counts=True)
    with pytest.raises(records.RecordError, match="alone"):
        records.read_metrics(content)


def test_an_optimizer_that_changes_the_model_in_place_is_named_and_harms_nobody_else(experiment, context):
    """All clients of a process begin a round with the same tensors."""

    class InPlace(DPSGD):
        def update(self, params, private_gradient, state, info):
            return {name: p.sub_(private_gradient[name]) for name, p in params.items()}, state

    arrays = records.to_arrays(trainable(experiment.loss_fn.module))
    content = RecordDict({records.ARRAYS: arrays, records.ASSIGNMENT: records.assignment_record(ASSIGNMENT)})
    made = {"now": Experiment.build(CONFIG, optimizer=InPlace(lr=0.1))}
    app = make_client_app(lambda _: made["now"])
    reply = answer(app, Message(content, context.node_id, MessageType.TRAIN), context)
    assert reply.has_error()
    assert "in place" in reply.error.reason
    made["now"] = experiment
    replies = [
        answer(each, Message(content, context.node_id, MessageType.TRAIN), fresh(context)) for each in (app, app)
    ]
    alone = answer(make_client_app(lambda _: experiment), Message(content, context.node_id, MessageType.TRAIN), context)
    assert all(reply.content[records.ARRAYS] == alone.content[records.ARRAYS] for reply in replies)


def fresh(context):
    return node_context(context.node_id, CONFIG.settings(), 3)
