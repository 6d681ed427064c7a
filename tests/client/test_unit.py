"""What one whole client may add: one bound over all tensors, whatever it holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

from fed_dpsat.accounting.event import CLIENTS, PrivacyEvent
from fed_dpsat.accounting.plans import LocalTraining
from fed_dpsat.client import unit as client_level
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.unit import bounded, bounded_model, bounded_move, excess, largest
from fed_dpsat.settings.config import RunConfig


def of_norm(norm, tensors=62, seed=0):
    generator = torch.Generator().manual_seed(seed)
    change = {str(i): torch.randn(3, 2, generator=generator, dtype=torch.float64) for i in range(tensors)}
    scale = norm / total(change)
    return {name: value * scale for name, value in change.items()}


def total(params):
    return math.sqrt(sum(float(value.double().square().sum()) for value in params.values()))


def check_62_tensors_together_are_bounded_once():
    """Clipping each tensor makes the norm C * sqrt(62), as in public code (METHODS.md, mistake 3)."""
    change = of_norm(1000.0)
    clipped = client_level.bounded(change, 0.5)
    assert total(clipped) == pytest.approx(0.5)
    assert all(torch.allclose(clipped[n], change[n] / 2000) for n in change)


def test_62_tensors_together_are_bounded_once():
    check_62_tensors_together_are_bounded_once()


def test_clipping_each_tensor_is_found(monkeypatch):
    one = client_level.bounded

    def each(change, clip_norm):
        return {n: one({n: value}, clip_norm)[n] for n, value in change.items()}

    assert total(each(of_norm(1000.0), 0.5)) == pytest.approx(0.5 * math.sqrt(62))
    monkeypatch.setattr(client_level, "bounded", each)
    with pytest.raises(AssertionError):
        check_62_tensors_together_are_bounded_once()


def test_a_change_within_the_bound_stays_as_it_is():
    change = of_norm(0.3)
    assert all(torch.equal(bounded(change, 0.5)[n], value) for n, value in change.items())
    assert total(bounded(of_norm(7.0), math.inf)) == pytest.approx(7.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_no_change(value):
    change = {**of_norm(1.0), "0": torch.tensor([1.0, value])}
    assert total(bounded(change, 0.5)) == 0
    assert total(bounded(largest(change, 0.1), 0.5)) == 0


def test_zero_stays_zero():
    zero = {"w": torch.zeros(3)}
    assert total(bounded(zero, 0.5)) == 0
    assert total(largest(zero, 0.5)) == 0


def test_the_largest_of_all_tensors_together_are_kept():
    change = {"a": torch.tensor([[0.1, -5.0], [0.3, 0.2]]), "b": torch.tensor([4.0]), "c": torch.tensor(0.0)}
    kept = largest(change, 2 / 6)
    assert kept["a"].tolist() == [[0.0, -5.0], [0.0, 0.0]]
    assert (kept["b"].tolist(), float(kept["c"]), kept["c"].shape) == ([4.0], 0.0, ())
    assert largest(change, 1.0) is change
    assert sum(int((v != 0).sum()) for v in largest(change, 0.4).values()) == 3  # ceil(2.4)


def test_what_is_kept_is_chosen_before_it_is_bounded():
    """After the selection there is room again: the norm of what is sent is C, not that of a part of C."""
    before = {"w": torch.zeros(4)}
    after = {"w": torch.tensor([30.0, 40.0, 30.0, 1.0])}
    sent = bounded_model(after, before, clip_norm=1.0, keep_share=0.25)["w"]
    assert sent.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_a_model_of_large_numbers_is_sent_within_the_bound_but_for_rounding():
    before = {"w": torch.full((10_000,), 100.0)}
    after = {"w": before["w"] + torch.randn(10_000, generator=torch.Generator().manual_seed(0))}
    sent = bounded_model(after, before, clip_norm=0.1, keep_share=1.0)
    assert excess(sent, before, 0.1) == 0
    assert total(bounded_move(sent, before, 0.1)) <= 0.1 * (1 + 1e-12)


def test_a_reply_beyond_the_bound_is_seen_and_bounded():
    before = {"w": torch.zeros(4)}
    after = {"w": torch.tensor([0.0, 0.5005, 0.0, 0.0])}
    assert excess(after, before, 0.5) == pytest.approx(0.0005, rel=1e-3)
    assert total(bounded_move(after, before, 0.5)) == pytest.approx(0.5, abs=1e-12)


def gradient(experiment, params):
    """Mean over all examples of client 0, in float64."""
    inputs, labels = experiment.dataset.train.batch(torch.from_numpy(experiment.partitions[0]))
    leaves = {n: p.detach().double().clone().requires_grad_() for n, p in params.items()}
    outputs = functional_call(experiment.loss_fn.module, leaves, (inputs.double(),))
    loss = torch.nn.functional.cross_entropy(outputs, labels)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_client_of_dp_fedsam_takes_the_steps_of_sam_and_sends_them_bounded_once(share):
    """DP-FedSAM (arXiv 2303.11242) up to the noise, which is the server's; with a share, of arXiv 2305.00873."""
    config = RunConfig(
        privacy_unit="client", optimizer="sam", noise_multiplier=1.0, num_clients=5, sample_rate=1.0, local_steps=4,
        rho=0.05, lr=0.3, clip_norm=0.05, keep_share=share, model="mlp",
    )  # fmt: skip
    experiment = Experiment.build(config)
    assignment = Assignment(
        round=1,
        event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.2, steps=1, kind=CLIENTS),
        training=LocalTraining(sample_rate=1.0, local_steps=4),
    )
    sent = experiment.client_round(0, assignment, experiment.shared(), None)
    start = {n: p.double() for n, p in experiment.shared().items()}
    at = dict(start)
    for _ in range(2):  # two calls each
        up = gradient(experiment, at)
        climbed = {n: p + 0.05 * up[n] / total(up) for n, p in at.items()}
        down = gradient(experiment, climbed)
        at = {n: p - 0.3 * down[n] for n, p in at.items()}
    change = {n: at[n] - start[n] for n in at}
    kept = largest(change, share)
    expected = {n: 0.05 * value / total(kept) for n, value in kept.items()}
    assert total(change) > 0.1  # so that clipping matters
    assert all(torch.allclose(sent.params[n].double() - start[n], expected[n], atol=1e-6) for n in expected)
    assert sent.event == assignment.event
    assert (sent.event.privacy_unit, sent.event.sample_rate, sent.event.steps) == ("client", 0.2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_given_is_changed_in_place(dtype, same_bits):
    after, before = {"w": torch.tensor([3.0, 5.0], dtype=dtype)}, {"w": torch.tensor([0.0, 1.0], dtype=dtype)}
    kept = [{name: value.clone() for name, value in params.items()} for params in (after, before)]
    assert float(client_level.bounded(after, 1.0)["w"].norm()) == pytest.approx(1.0)
    torch.testing.assert_close(
        client_level.bounded_move(after, before, 1.0)["w"], torch.tensor([0.6, 0.8], dtype=torch.float64)
    )
    client_level.bounded_model(after, before, clip_norm=1.0, keep_share=1.0)
    assert client_level.excess(after, before, 1.0) == pytest.approx(4.0)
    assert same_bits(after, kept[0])
    assert same_bits(before, kept[1])
