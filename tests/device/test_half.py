"""The client's half of a strategy on a device: its policy names the ones that run, and what they receive and send."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.device.client import unpack
from fed_dpsat.device.journal import open_journal
from fed_dpsat.device.release import CLIENT, journal_path, ledger_path
from fed_dpsat.flower.wire import records
from fed_dpsat.params import unflatten

DITTO = {"strategy": "ditto", "local_models": 2}
SCAFFOLD = {"strategy": "dp-scaffold", "local_models": 1}


def control(value=0.5):
    return records.to_arrays({"1.weight": torch.full((2, 2), value), "1.bias": torch.full((2,), value)})


def charged(device):
    if not ledger_path(device.folder).exists():
        return ()
    with PrivacyLedger(ledger_path(device.folder), readonly=True) as ledger:
        return ledger.history(CLIENT)


@pytest.fixture
def permitting(device):
    """The device with a policy that permits two strategies."""
    device.write(strategies='["ditto", "dp-scaffold"]')
    return device


@pytest.mark.parametrize(
    ("permitted", "changes", "says"),
    [
        (
            "[]",
            DITTO,
            "strategy='ditto' brings a client's half (local_models=2), and the policy of this device allows",
        ),
        ('["ditto"]', SCAFFOLD, "allows ditto; choose another one, or ask its owner to add it to strategies"),
        ('["ditto"]', {**DITTO, "strategy_args": "mu = 3.0"}, "strategy_args='mu = 3.0' is not allowed on this device"),
        ('["ditto"]', {**DITTO, "local_models": 1}, "local_models=1 is not 2, the models that strategy='ditto'"),
        ('["ditto"]', {**DITTO, "strategy": "fedavg"}, "strategy='fedavg' brings a client's half (local_models=2)"),
        ("[]", {"local_models": 1, "strategy": "{path}/evil.py:build"}, "brings a client's half (local_models=1)"),
    ],
)
def test_what_the_policy_does_not_name_is_refused_before_a_charge_and_not_loaded(
    device, tmp_path, permitted, changes, says
):
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    device.write(strategies=permitted)
    changes = {**changes, "strategy": changes["strategy"].format(path=tmp_path)}
    reply = device.ask(changes=changes)
    assert says in reply.error.reason
    assert charged(device) == ()
    assert not (tmp_path / "ran").exists()


def test_a_strategy_of_the_server_alone_needs_no_permission_and_is_not_loaded(device):
    assert device.ask(changes={"strategy": "no.such.module:build"}).has_content()


def test_steps_that_no_models_share_are_refused_before_a_charge(permitting, assignment):
    reply = permitting.ask(assignment(steps=3), changes=DITTO)
    assert "steps=3 is not a multiple of 2" in reply.error.reason
    assert charged(permitting) == ()


def test_a_permitted_half_is_charged_as_one_event_and_keeps_its_model_on_the_devices_disk(permitting, assignment):
    reply = permitting.ask(changes=DITTO)
    assert set(reply.content.array_records) == {"arrays"}
    assert charged(permitting) == (assignment().event,)
    with open_journal(journal_path(permitting.folder)) as journal:
        state = unflatten(unpack(journal.kept().state))
    assert state["half"]["own"].keys() == {"1.weight", "1.bias"}
    assert permitting.ask(dataclasses.replace(assignment(), round=2), changes=DITTO).has_content()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({}, "the message has no 'control' record"),
        ({"control": records.to_arrays({"1.weight": torch.zeros(2, 2)})}, "the names of the 1 arrays"),
        ({"control": records.to_arrays({"1.weight": torch.zeros(2, 3), "1.bias": torch.zeros(2)})}, "1.weight "),
        ({"control": control(float("nan"))}, "1.weight has NaN or inf"),
        ({"control": control(), "more": control()}, "the message has a record 'more', which a device rejects"),
    ],
)
def test_records_that_the_half_does_not_receive_are_refused_before_a_charge(permitting, extra, says):
    reply = permitting.ask(changes=SCAFFOLD, extra=extra)
    assert says in reply.error.reason
    assert charged(permitting) == ()


def test_what_a_half_sends_is_stored_with_the_reply_and_sent_again(permitting, assignment):
    replies = [permitting.ask(changes=SCAFFOLD, extra={"control": control()}) for _ in range(2)]
    first, again = (reply.content["control"] for reply in replies)
    assert list(first) == ["1.weight", "1.bias"]
    assert all(np.array_equal(first[name].numpy(), again[name].numpy()) for name in first)
    assert charged(permitting) == (assignment().event,)
    other = permitting.ask(changes=SCAFFOLD, extra={"control": control(0.7)})
    assert "had other content before" in other.error.reason  # the journal knows a request by its records too
