"""On a device, frozen layers come from its own file and from nowhere else."""

from __future__ import annotations

import pytest
import torch

from fed_dpsat.device.client import _experiment
from fed_dpsat.device.policy import Policy
from fed_dpsat.flower.wire import records
from fed_dpsat.models.mlp import mlp

FROM = {"start_from": "server.pt", "train_layers": "last", "model": "mlp"}


@pytest.fixture
def weights(device):
    """The device has weights of the network, and allows it."""
    torch.manual_seed(3)
    state = mlp((1, 1, 2), 2).state_dict()
    torch.save(state, device.path / "own.pt")
    device.write(models='["mlp", "linear"]', start_from='"own.pt"', adapters='["ffa-lora"]')
    return state


def head(state):
    return {name: state[name] for name in ("3.weight", "3.bias")}


def test_the_head_alone_is_sent_to_it_and_comes_back(device, weights):
    reply = device.ask(params=head(weights), changes=FROM)
    assert reply.has_content(), reply.error
    assert list(records.to_params(reply.content.array_records[records.ARRAYS])) == ["3.weight", "3.bias"]


def test_its_own_file_says_what_is_frozen(device, weights, settings):
    policy = Policy.load(device.policy_path)
    config = policy.admit(7, {**settings, **FROM})
    assert config.start_from == str(device.path / "own.pt")
    model = _experiment(policy, config).loss_fn.module
    assert torch.equal(model.state_dict()["1.weight"], weights["1.weight"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(head(weights))


def test_without_a_file_of_its_own_it_refuses(device, weights):
    device.write(models='["mlp"]')
    reply = device.ask(params=head(weights), changes=FROM)
    assert "train_layers='last' needs the weights of frozen layers" in reply.error.reason


def test_an_adapter_needs_its_file_too_and_finds_it(device, weights, settings):
    pytest.importorskip("peft")
    changes = {**FROM, "train_layers": "all", "adapter": "ffa-lora", "adapter_targets": "1"}
    policy = Policy.load(device.policy_path)
    module = _experiment(policy, policy.admit(7, {**settings, **changes})).loss_fn.module
    assert torch.equal(module.state_dict()["1.base_layer.weight"], weights["1.weight"])
    device.write(models='["mlp"]', adapters='["ffa-lora"]')
    reply = device.ask(params=head(weights), changes=changes)
    assert "adapter='ffa-lora' needs the weights of frozen layers" in reply.error.reason


def test_where_all_is_trained_no_file_is_opened(device, weights):
    """The server's path would lead nowhere; what it names came with the message."""
    device.write(models='["mlp"]')
    reply = device.ask(params=dict(weights), changes={**FROM, "train_layers": "all", "start_head": "new"})
    assert reply.has_content(), reply.error


def test_another_set_of_layers_than_was_agreed_on_is_refused(device, weights):
    reply = device.ask(params=dict(weights), changes=FROM)
    assert "4 arrays are not the 2 of the model" in reply.error.reason


def test_the_head_first_and_then_all(device, weights, assignment):
    changes = {**FROM, "train_layers": "head-then-all", "unfreeze_round": 2, "momentum": 0.5}
    first = device.ask(params=head(weights), changes=changes)
    assert first.has_content(), first.error
    assert (
        "2 arrays are not the 4" in device.ask(assignment(round=2), params=head(weights), changes=changes).error.reason
    )
    second = device.ask(assignment(round=2), params=dict(weights), changes=changes)
    assert second.has_content(), second.error
    assert len(records.to_params(second.content.array_records[records.ARRAYS])) == 4


def test_a_file_of_another_network_is_refused_in_words(device, weights):
    torch.save({"a": torch.ones(1)}, device.path / "own.pt")
    said = device.ask(params=head(weights), changes=FROM).error.reason
    assert "start_from='of the device' is not weights of this model (missing: 1.weight" in said
    assert str(device.path) not in said
