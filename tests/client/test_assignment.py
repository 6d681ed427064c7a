"""What a plan costs, what is charged, what is sent, what runs and what a reply says are one event."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpsat import RunConfig
from fed_dpsat.accounting.event import CLIENTS, PrivacyError, PrivacyEvent
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import ClientPlan, LocalTraining, make_plans, plan_of
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.train import Request
from fed_dpsat.device.policy import Policy
from fed_dpsat.errors import SettingError
from fed_dpsat.flower.wire import records

OF_CLIENTS = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.2, steps=1, kind=CLIENTS)
OF_EXAMPLES = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.2, steps=3)

CONFIGS = st.builds(
    RunConfig,
    num_clients=st.just(2),
    noise_multiplier=st.floats(0.5, 20.0),
    sample_rate=st.floats(0.01, 1.0),
    local_steps=st.integers(1, 7),
    num_rounds=st.integers(1, 3),
    privacy_unit=st.sampled_from(["example", "client"]),
    optimizer=st.just("dp-sgd"),
    clients_per_round=st.sampled_from([0, 1]),
    client_sampling=st.sampled_from(["fixed", "poisson"]),
    accountant=st.just("rdp"),
    target_epsilon=st.sampled_from([0.0, 1e6]),
    budget_mode=st.just("retire"),
    private=st.just(True),
    tune_malloc=st.just(False),
    threads_per_client=st.just(1),
)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment.build(RunConfig(num_clients=2, optimizer="dp-sgd", noise_multiplier=1.0, target_epsilon=0.0))


def by_its_settings(config: RunConfig) -> PrivacyEvent:
    """The event of a round, written down once more."""
    noise = config.noise_multiplier
    if config.privacy_unit == "client":
        rate = config.client_rate if config.client_sampling == "poisson" else 1.0
        return PrivacyEvent(noise_multiplier=noise, sample_rate=rate, steps=1, kind=CLIENTS)
    return PrivacyEvent(noise_multiplier=noise, sample_rate=config.sample_rate, steps=config.local_steps)


@settings(max_examples=20, deadline=None)
@given(config=CONFIGS, round=st.integers(1, 99), attempt=st.integers(0, 5))
def test_plan_charge_message_run_and_reply_name_one_event(experiment, config, round, attempt):
    plan = make_plans(config)[1]
    assignment = Assignment.of(plan, round=round, attempt=attempt)
    assert assignment.event is plan.event
    assert plan.event == plan_of(config).event == by_its_settings(config)
    with PrivacyLedger(":memory:") as ledger:
        ledger.charge_many(round, attempt, {1: assignment.event})
        assert ledger.history(1) == (plan.event,)
    sent = records.read_assignment(RecordDict({records.ASSIGNMENT: records.assignment_record(assignment)}))
    assert sent == assignment
    assert (sent.sample_rate, sent.local_steps) == (config.sample_rate, config.local_steps)
    ran = dataclasses.replace(experiment, config=dataclasses.replace(experiment.config, **own_settings(config)))
    request = Request(client=1, assignment=sent, params=ran.shared(1), state=None)
    result = trained(ran, request)
    assert records.read_event(records.reply_content(1, sent, result, 1)) == (1, round, attempt, plan.event)


def own_settings(config: RunConfig) -> dict[str, object]:
    names = ("noise_multiplier", "sample_rate", "local_steps", "privacy_unit")
    return {name: getattr(config, name) for name in names}


def trained(experiment: Experiment, request: Request):
    """The client's round on batches of nothing: its coins and its mechanism are those of a run."""
    experiment = dataclasses.replace(experiment, partitions=[torch.arange(1).numpy(), torch.arange(1, 2).numpy()])
    return experiment.client_round(**vars(request))


@pytest.mark.parametrize("make", [ClientPlan, Assignment])
@pytest.mark.parametrize(
    ("event", "training"), [(OF_EXAMPLES, LocalTraining(sample_rate=0.9, local_steps=9)), (OF_CLIENTS, None)]
)
def test_the_work_of_one_unit_does_not_stand_beside_the_event_of_the_other(make, event, training):
    more = {"target_epsilon": 0.0, "first_round": 1} if make is ClientPlan else {"round": 1}
    with pytest.raises(SettingError, match="training="):
        make(event=event, training=training, **more)


def test_a_client_refuses_work_of_another_unit_than_the_runs(experiment):
    training = LocalTraining(sample_rate=0.5, local_steps=1)
    asked = Assignment(round=1, event=OF_CLIENTS, training=training)
    with pytest.raises(PrivacyError, match="the assignment has the unit 'client'"):
        experiment.client_round(0, asked, experiment.shared(1), None)


def test_what_ran_at_another_cost_than_was_charged_is_not_sent(experiment, monkeypatch):
    """A client whose sampler took another rate than the assignment's would reply with another event."""
    asked = Assignment(round=1, event=OF_EXAMPLES)
    monkeypatch.setattr(Assignment, "local_steps", property(lambda self: 2))
    with pytest.raises(PrivacyError, match="was charged; nothing is sent"):
        experiment.client_round(0, asked, experiment.shared(1), None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 7}, "seed"),
        ({"round": 1.0}, "round=1.0"),
        ({"attempt": True}, "attempt=True"),
        ({"kind": CLIENTS}, "LocalTraining"),
        ({"local_steps": 3}, "local_sample_rate, local_steps"),
        ({"local_sample_rate": 0.5, "local_steps": 3}, "unit 'example'"),
    ],
)
def test_a_record_that_was_not_written_here_is_refused(changes, says):
    honest = Assignment(round=1, event=OF_EXAMPLES).to_dict()
    with pytest.raises(ValueError, match=says):
        Assignment.from_dict({**honest, **changes})


def test_devices_know_the_record_of_the_unit_example():
    policy = Policy(
        folder="x", client=0, dataset="d", data_source="function", data_path="a:b", largest_epsilon=1.0,
        largest_delta=1e-5, least_noise_multiplier=0.5, models=("linear",),
    )  # fmt: skip
    assignment = Assignment(round=2, attempt=1, event=OF_EXAMPLES)
    assert policy.admit_assignment(assignment.to_dict(), RunConfig(target_epsilon=1.0)) == assignment
