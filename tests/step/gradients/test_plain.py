"""Training without a bound takes an ordinary pass, to the sum that the reference engine gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fed_dpsat.params import trainable
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.gradients import formats, plain, planned
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum

UNBOUNDED = FlatClipping(clip_norm=float("inf"))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def batch(size=6):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 8, 8, generator=draw), torch.randint(3, (size,), generator=draw)


def sums(module, data, engine):
    params = {name: p.detach() for name, p in module.named_parameters()}
    return clipped_gradient_sum(ModelLoss(module), params, data, UNBOUNDED, engine=engine)


def test_it_is_taken_and_agrees_with_the_reference(monkeypatch):
    module, data, taken = network(), batch(), []
    plain_sum = plain.plain_sum
    monkeypatch.setattr(planned, "plain_sum", lambda *a: taken.append(1) or plain_sum(*a))
    total, skipped = sums(module, data, "auto")
    expected, _ = sums(module, data, "vmap")
    assert taken == [1]
    assert skipped == 0
    for name, value in expected.items():
        torch.testing.assert_close(total[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_example_that_is_not_finite_is_still_dropped_and_counted(bad):
    module, (inputs, targets) = network(), batch()
    inputs[2, 0, 0, 0] = bad
    total, skipped = sums(module, (inputs, targets), "auto")
    rest = [0, 1, 3, 4, 5]
    expected, _ = sums(module, (inputs[rest], targets[rest]), "vmap")
    assert skipped == 1
    for name, value in expected.items():
        torch.testing.assert_close(total[name], value, rtol=1e-5, atol=1e-6)


def test_a_pass_that_is_thrown_away_moves_no_generator():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 3))
    params = {name: p.detach() for name, p in module.named_parameters()}
    inputs, targets = batch()
    inputs[2] = float("nan")
    for loss in (ModelLoss(module), lambda *given: ModelLoss(module)(*given) * torch.rand(6)):
        torch.manual_seed(5)
        assert plain.plain_sum(loss, params, inputs, targets) is None
        after = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(1), after)


def test_no_other_rule_is_taken_for_unbounded():
    assert plain.unbounded(UNBOUNDED)
    assert not plain.unbounded(FlatClipping(clip_norm=1e30))
    assert not plain.unbounded(AutomaticClipping(clip_norm=1.0))


class Plus(nn.Module):
    """A weight that is the sum of another and ``more``."""

    def __init__(self, more):
        super().__init__()
        self.more = nn.Parameter(more)

    def forward(self, weight):
        return weight + self.more


class Spread(nn.Module):
    """A weight whose every number is the sum of another's."""

    def forward(self, weight):
        return weight.sum().expand(weight.shape)


@pytest.mark.parametrize("part", [Plus(torch.ones(3, 4)), Spread()])
def test_a_tensor_that_autograd_hands_out_twice_is_added_up_once(part):
    """It gives both terms of a sum one tensor, and all terms of ``sum()`` one number; chunks are added in place."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3))
    parametrize.register_parametrization(module[0], "weight", part)
    params = {name: p.detach() for name, p in module.named_parameters()}
    data = torch.randn(8, 4), torch.randint(3, (8,))
    whole, chunks, reference = (
        clipped_gradient_sum(ModelLoss(module), params, data, UNBOUNDED, engine=engine, physical_batch_size=size)[0]
        for engine, size in (("auto", 8), ("auto", 2), ("vmap", 8))
    )
    for name, expected in reference.items():
        torch.testing.assert_close(whole[name], expected)
        torch.testing.assert_close(chunks[name], expected)


@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 2, 3, 2), (6, 5)])
def test_norms_in_every_format(shape):
    inputs = torch.randn(5, *shape, generator=torch.Generator().manual_seed(2))
    if inputs.ndim > 3:
        inputs = inputs.to(memory_format=torch.channels_last if inputs.ndim == 4 else torch.channels_last_3d)
    module = nn.Sequential(nn.GroupNorm(3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(inputs[0].numel(), 3))
    data = inputs, torch.arange(5) % 3
    expected, _ = sums(module, data, "vmap")
    for name, value in sums(module, data, "auto")[0].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    params = {name: p.detach() for name, p in module.named_parameters()}
    found = plain.plain_sum(ModelLoss(module), params, *data)  # also in the format that the engine would not choose
    assert all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-6) for name, value in expected.items())


class Pooled(nn.Module):
    """Two max pools, one of them no module, and a flat layer whose gradient has its channels in planes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(32, 3)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.first(x).relu(), 2)
        return self.head(self.pool(self.second(x).relu()).flatten(1))


@pytest.mark.parametrize(("clipping", "room"), [(UNBOUNDED, plain), (FlatClipping(clip_norm=1.0), planned)])
def test_gradients_of_pools_are_laid_out_as_inputs_and_the_same_to_the_bit(clipping, room, monkeypatch, same_bits):
    torch.manual_seed(0)
    module, data, seen = Pooled(), batch(), []
    loss, params, turn = ModelLoss(module), trainable(module), formats._channels_last
    clipped_gradient_sum(loss, params, data, clipping)  # with made-up examples first

    def spy(gradients):
        turned = turn(gradients)
        seen.append((gradients[0].stride(1), turned[0].stride(1)))
        return turned

    with monkeypatch.context() as patch:
        patch.setattr(formats, "_channels_last", spy)
        total, _ = clipped_gradient_sum(loss, params, data, clipping)
    assert seen == [(4, 1), (1, 1)]
    assert formats._channels_last((None, None)) == (None, None)
    monkeypatch.setattr(room, "turn_gradients", lambda total: None)
    assert same_bits(total, clipped_gradient_sum(loss, params, data, clipping)[0])
