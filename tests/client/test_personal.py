"""Private heads: which parameters stay, who is measured on what, and that the whole gradient is clipped and noised."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.personal import PERSONAL, deal_test, only, personal_names, without
from fed_dpsat.client.train import Request
from fed_dpsat.errors import SettingError
from fed_dpsat.params import trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.mechanism import GaussianMechanism, normals_like
from fed_dpsat.step.noise import derive_generator

CONFIG = RunConfig(
    noise_multiplier=1.0,
    model="mlp",
    optimizer="dp-sgd",
    personal_layers="head",
    num_clients=4,
    sample_rate=1.0,
    lr=0.5,
    clip_norm=0.1,
)
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=1.0, steps=1))
HEAD, BODY = {"3.weight", "3.bias"}, {"1.weight", "1.bias"}


@pytest.fixture(scope="module")
def experiment():
    return Experiment.build(CONFIG)


def params(*names):
    return {name: torch.zeros(1) for name in names}


def test_names():
    model = params("1.weight", "1.bias", "3.weight", "3.bias", "scale")
    assert personal_names(model, "") == frozenset()
    assert personal_names(without(model, ["scale"]), "head") == HEAD
    assert personal_names(model, "head") == {"scale"}  # a parameter of no layer is the last one
    assert personal_names(model, "3.bias, 1") == {"1.weight", "1.bias", "3.bias"}


@pytest.mark.parametrize(("given", "said"), [("fc", "no 'fc'"), ("0", "did you mean"), ("1, 3", "nothing would be")])
def test_a_name_that_is_none_and_a_model_that_shares_nothing(given, said):
    with pytest.raises(SettingError, match=said):
        personal_names(params("1.weight", "1.bias", "3.weight"), given)


def test_a_model_of_one_layer_has_no_head():
    with pytest.raises(SettingError, match="a model of one layer has no head"):
        Experiment.build(dataclasses.replace(CONFIG, model="linear"))


def test_shares_of_the_test_split_have_the_labels_of_their_clients():
    train = np.array([0, 0, 0, 1, 1, 2])
    partitions = [np.array([0, 1]), np.array([2, 3, 4]), np.array([5])]
    test = np.array([0] * 6 + [1] * 3 + [2] * 2 + [3] * 4)  # nobody trains on class 3
    shares = deal_test(train, test, partitions, seed=0)
    assert [np.bincount(test[share], minlength=4).tolist() for share in shares] == [
        [4, 0, 0, 0], [2, 3, 0, 0], [0, 0, 2, 0]
    ]  # fmt: skip
    assert len(np.unique(np.concatenate(shares))) == 11
    again = deal_test(train, test, partitions, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))


def test_largest_remainders_give_all_of_a_class_away_and_ties_to_no_client_in_particular():
    partitions = [np.array([i]) for i in range(10)]
    dealt = [deal_test(np.zeros(10, int), np.zeros(3, int), partitions, seed=s) for s in range(20)]
    assert all(sum(map(len, shares)) == 3 for shares in dealt)
    assert len({tuple(map(len, shares)) for shares in dealt}) > 5


def test_the_head_stays_in_the_state_and_goes_on_from_there(experiment):
    first = experiment.client_round(0, ASSIGNMENT, experiment.shared(), None)
    assert first.params.keys() == BODY
    assert first.state[PERSONAL].keys() == HEAD
    initial = trainable(experiment.loss_fn.module)
    assert not torch.equal(first.state[PERSONAL]["3.weight"], initial["3.weight"])
    whole = experiment.whole(first.params, first.state)
    assert list(whole) == list(initial)
    assert torch.equal(whole["3.bias"], first.state[PERSONAL]["3.bias"])
    shared = Experiment.build(dataclasses.replace(CONFIG, personal_layers=""))
    second = dataclasses.replace(ASSIGNMENT, round=2)
    expected = shared.client_round(0, second, whole, {k: v for k, v in first.state.items() if k != PERSONAL})
    found = experiment.client_round(0, second, first.params, first.state)
    assert all(torch.equal(expected.params[n], p) for n, p in {**found.params, **found.state[PERSONAL]}.items())
    assert found.event == expected.event


def step_in_float64(experiment, client):
    """The whole model after one step on all examples, by autograd, one example at a time."""
    module = experiment.loss_fn.module
    start = {n: p.double() for n, p in trainable(module).items()}
    total = {n: torch.zeros_like(p) for n, p in start.items()}
    indices = torch.from_numpy(experiment.partitions[client])
    inputs, labels = experiment.dataset.train.batch(indices)
    for x, y in zip(inputs.double(), labels, strict=True):
        leaves = {n: p.clone().requires_grad_() for n, p in start.items()}
        loss = torch.nn.functional.cross_entropy(torch.func.functional_call(module, leaves, (x[None],)), y[None])
        grads = torch.autograd.grad(loss, list(leaves.values()))
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        for n, g in zip(leaves, grads, strict=True):
            total[n] += g * min(1.0, CONFIG.clip_norm / float(norm))
    noise = derive_generator(CONFIG.seed, purpose="noise", client=client, round=1)
    drawn = {name: normals.double() for name, normals in normals_like(start, noise).items()}
    return {n: p - CONFIG.lr * (total[n] + CONFIG.clip_norm * drawn[n]) / len(indices) for n, p in start.items()}


def check_the_whole_gradient_is_clipped_and_noised_together(experiment):
    result = experiment.client_round(1, ASSIGNMENT, experiment.shared(), None)
    for name, expected in step_in_float64(experiment, 1).items():
        found = {**result.params, **result.state[PERSONAL]}[name]
        assert torch.allclose(found.double(), expected, atol=2e-6), name


def test_the_whole_gradient_is_clipped_and_noised_together(experiment):
    check_the_whole_gradient_is_clipped_and_noised_together(experiment)


def test_a_head_without_noise_is_found(experiment, monkeypatch):
    """Nobody sends a head, so noise on it may seem a waste; the next body's release is taken at it."""
    privatize = GaussianMechanism.privatize

    def spares_the_head(self, clipped_sum, generator):
        private = privatize(self, clipped_sum, generator)
        clean = {n: total / self.expected_batch_size for n, total in clipped_sum.items()}
        return {n: clean[n] if n in HEAD else p for n, p in private.items()}

    monkeypatch.setattr(GaussianMechanism, "privatize", spares_the_head)
    with pytest.raises(AssertionError):
        check_the_whole_gradient_is_clipped_and_noised_together(experiment)


def test_the_head_of_the_last_round_decides_where_the_body_is_released(experiment):
    """Why it has to be noised: another head, and the same coins and noise give another body."""
    state = experiment.client_round(0, ASSIGNMENT, experiment.shared(), None).state
    moved = {**state, PERSONAL: {n: p + 1 for n, p in state[PERSONAL].items()}}
    one, other = (experiment.client_round(0, ASSIGNMENT, experiment.shared(), s).params for s in (state, moved))
    assert not torch.equal(one["1.weight"], other["1.weight"])


def test_fedprox_pulls_what_the_global_model_has(experiment):
    two = dataclasses.replace(ASSIGNMENT, event=dataclasses.replace(ASSIGNMENT.event, steps=2))
    result = experiment.client_round(0, two, experiment.shared(), None, proximal_mu=10.0)
    free = experiment.client_round(0, two, experiment.shared(), None)
    assert not torch.equal(result.params["1.weight"], free.params["1.weight"])


def test_stacked_clients_keep_a_head_each(experiment):
    requests = []
    for client in range(3):
        state = experiment.client_round(client, ASSIGNMENT, experiment.shared(), None).state
        requests.append(Request(client=client, assignment=ASSIGNMENT, params=experiment.shared(), state=state))
    shared = requests[0].params
    requests = [dataclasses.replace(request, params=shared) for request in requests]
    for request, stacked in zip(requests, experiment.client_rounds(requests), strict=True):
        alone = experiment.client_round(**vars(request))
        assert stacked.params.keys() == BODY
        for one, other in ((alone.params, stacked.params), (alone.state[PERSONAL], stacked.state[PERSONAL])):
            assert all(torch.allclose(one[n], other[n], atol=1e-6) for n in one)


def test_only_and_without_keep_the_order():
    model = params("a", "b", "c")
    assert list(only(model, {"c", "a"})) == ["a", "c"]
    assert list(without(model, {"b"})) == ["a", "c"]


def test_a_client_with_a_head_carries_state(experiment):
    assert experiment.carried_state() == {PERSONAL}


def test_a_model_without_anything_to_train_is_told_as_that():
    with pytest.raises(SettingError, match="without a parameter that learns"):
        personal_names({}, "")
