"""A device that protects persons: its policy states the unit, and no server changes it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.device.command import app
from fed_dpsat.device.data import size
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.device.release import CLIENT, open_ledger
from fed_dpsat.flower.wire import records

DATA = """
import numpy as np
import torch
from fed_dpsat.data import Examples

def examples():
    labels, columns = torch.arange(20) % 2, {"patient": np.arange(20) // 3}
    inputs = labels.float().view(20, 1, 1).repeat(1, 1, 2)
    return Examples(inputs=inputs, labels=labels, mean=(0.0,), std=(1.0,), columns=columns)
"""
EVENT = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=2, kind="poisson_gaussian_users")
CHANGES = {"privacy_unit": "user", "user_column": "theirs"}


@pytest.fixture
def patients(device):
    (device.path / "data.py").write_text(DATA)
    device.write(privacy_unit='"user"', user_column='"patient"', largest_user_examples=8)
    return device


def test_a_round_is_charged_for_persons_of_the_devices_own_column(patients):
    reply = patients.ask(Assignment(round=1, event=EVENT), changes=CHANGES)
    assert not reply.has_error(), reply.error.reason
    with open_ledger(patients.folder, readonly=True) as ledger:
        assert ledger.history(CLIENT) == (EVENT,)
    assert reply.content.metric_records[records.METRICS][records.NUM_EXAMPLES] == 7


def test_the_size_is_that_of_persons(patients):
    assert size(Policy.load(patients.policy_path)) == 7


@pytest.mark.parametrize(
    ("changes", "event", "says"),
    [
        (
            {"privacy_unit": "example"},
            EVENT,
            "privacy_unit='example' is not allowed on this device; choose one of user",
        ),
        ({}, PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=2), "kind='poisson_gaussian' is not allowed"),
        ({"user_examples": 9}, EVENT, "user_examples=9 is not in [1, 8]"),
    ],
)
def test_a_server_cannot_ask_for_another_unit(patients, changes, event, says):
    reply = patients.ask(Assignment(round=1, event=event), changes={**CHANGES, **changes})
    assert says in reply.error.reason
    with open_ledger(patients.folder, readonly=True) as ledger:
        assert not ledger.history(CLIENT)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"user_column": '""'}, "user_column='' is not named with privacy_unit = 'user'"),
        ({"privacy_unit": '"example"'}, "user_column='patient' is not"),
        ({"privacy_unit": '"client"'}, "privacy_unit='client' is not example or user"),
        ({"largest_user_examples": 0}, "largest_user_examples=0 is not at least 1"),
    ],
)
def test_a_policy_names_unit_and_column_together(patients, changes, says):
    given = {"privacy_unit": '"user"', "user_column": '"patient"', **changes}
    patients.write(**given)
    with pytest.raises(PolicyError, match=says):
        Policy.load(patients.policy_path)


def test_init_says_how_many_persons_there_are_and_which_column_is_missing(patients):
    other = {"privacy_unit": '"user"', "folder": '"new"'}
    patients.write(**other, user_column='"patient"')
    said = CliRunner().invoke(app, ["init", str(patients.policy_path)])
    assert "7 persons, ledger created" in said.stdout
    patients.write(**{**other, "folder": '"third"'}, user_column='"pacient"')
    wrong = CliRunner().invoke(app, ["init", str(patients.policy_path)])
    assert wrong.exit_code == 2
