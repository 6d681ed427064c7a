"""A module at given parameters: the same as ``torch.func.functional_call``, and as it was afterwards."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fed_dpsat.models.resnet import wrn16_4_gn
from fed_dpsat.params import trainable
from fed_dpsat.step.gradients.call import call, modules


class Tied(nn.Module):
    """Two linear layers with one weight, a frozen scale, and a layer that is there twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.again = self.first
        self.nothing = None
        self.register_parameter("absent", None)

    def forward(self, x):
        return self.scale * self.again(self.second(self.first(x)))


def doubled(module):
    return {name: 2 * p for name, p in trainable(module).items()}


@pytest.mark.parametrize(("make", "shape"), [(Tied, (3,)), (lambda: wrn16_4_gn((3, 8, 8), 10), (3, 8, 8))])
def test_the_same_as_functional_call_and_the_module_as_before(make, shape):
    module, x = make(), torch.randn(2, *shape)
    before = dict(module.named_parameters())
    params = doubled(module)
    expected = functional_call(copy.deepcopy(module), params, (x,))  # which leaves a layer that is there twice changed
    assert torch.equal(call(module, params, x), expected)
    assert all(p is before[name] for name, p in module.named_parameters())
    assert modules(module) == list(module.modules())


def test_gradients_are_of_what_was_given():
    module, x = Tied(), torch.randn(2, 3)
    leaves = {name: p.requires_grad_() for name, p in doubled(module).items()}
    found = torch.autograd.grad(call(module, leaves, x).sum(), list(leaves.values()))
    again = functional_call(copy.deepcopy(module), leaves, (x,))
    expected = torch.autograd.grad(again.sum(), list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(p.grad is None for p in module.parameters())


def test_the_module_is_as_before_after_an_error():
    module = Tied()
    before = module.first.weight
    with pytest.raises(RuntimeError):
        call(module, doubled(module), torch.randn(2, 4))
    assert module.first.weight is module.second.weight is before


def test_what_is_no_parameter_of_the_module_is_left_to_torch():
    module, x = nn.BatchNorm1d(3).eval(), torch.randn(2, 3)
    given = {"running_mean": torch.ones(3)}
    assert torch.equal(call(module, given, x), functional_call(module, given, (x,)))
    pair = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    pair[1].weight = pair[0].weight
    with pytest.raises(ValueError, match="tied"):
        call(pair, {"0.weight": torch.ones(3, 3), "1.weight": torch.zeros(3, 3)}, x)
