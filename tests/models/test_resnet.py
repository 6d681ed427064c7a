import pytest
import torch
from torch import nn

from fed_dpsat.models.resnet import BasicBlock, WideBlock, WSConv2d, resnet10_gn, resnet20_gn, wrn16_4_gn

FACTORIES = {"resnet20-gn": (resnet20_gn, 4), "wrn16-4-gn": (wrn16_4_gn, 4), "resnet10-gn": (resnet10_gn, 8)}


def convolutions(model: nn.Module) -> int:
    """All but the 1x1 ones of shortcuts."""
    return sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules())


@pytest.mark.parametrize(
    ("factory", "depth", "groups"), [(resnet20_gn, 20, 8), (wrn16_4_gn, 16, 16), (resnet10_gn, 10, 32)]
)
def test_depth_and_groups(factory, depth, groups):
    """A depth counts 3x3 convolutions and the linear layer; WRN-16 its three shortcuts, not the latter."""
    model = factory((3, 8, 8), 10)
    shortcuts = sum(not isinstance(m.shortcut, nn.Identity) for m in model if hasattr(m, "shortcut"))
    assert convolutions(model) + (shortcuts if factory is wrn16_4_gn else 1) == depth
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.affine) for m in norms} == {(groups, True)}


@pytest.mark.parametrize("name", FACTORIES)
def test_sides_below_the_least_are_refused(name):
    factory, least = FACTORIES[name]
    assert factory((1, least, least + 1), 2)(torch.zeros(1, 1, least, least + 1)).shape == (1, 2)
    with pytest.raises(ValueError, match=rf"model='{name}': .* at least {least}; use 'mlp'"):
        factory((1, least - 1, least), 2)


@pytest.mark.parametrize("block", [BasicBlock, WideBlock])
def test_a_block_halves_and_widens_or_keeps_its_shape(block):
    x = torch.zeros(1, 16, 8, 8)
    assert block(16, 32, stride=2, groups=8)(x).shape == (1, 32, 4, 4)
    kept = block(16, 16, stride=1, groups=8)
    assert isinstance(kept.shortcut, nn.Identity)
    assert kept(x).shape == x.shape


@pytest.mark.parametrize("block", [BasicBlock, WideBlock])
def test_a_block_with_a_silent_residual_is_its_shortcut(block):
    torch.manual_seed(0)
    quiet = block(16, 16, stride=1, groups=8)
    with torch.no_grad():
        for parameter in quiet.residual.parameters():
            parameter.zero_()
    x = torch.rand(2, 16, 4, 4)
    assert torch.equal(quiet(x), x)


def test_a_wide_block_rectifies_before_it_normalises():
    torch.manual_seed(0)
    block = WideBlock(16, 16, stride=1)
    x = torch.rand(1, 16, 4, 4) - 0.5
    lower = torch.where(x < 0, 2 * x, x)
    torch.testing.assert_close(block(lower) - lower, block(x) - x)


def test_standardised_filter_by_hand():
    """Filter (1, 3) has mean 2 and centred norm sqrt(2); a constant filter gives 0, not NaN."""
    layer = WSConv2d(2, 2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 3.0], [5.0, 5.0]]).reshape(2, 2, 1, 1))
        layer.gain.copy_(torch.tensor([10.0, 1.0]))
        layer.bias.copy_(torch.tensor([0.5, 0.25]))
    standard = layer.standardized_weight().flatten(1)
    torch.testing.assert_close(standard, torch.tensor([[-(50**0.5), 50**0.5], [0.0, 0.0]]))
    out = layer(torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)).flatten()
    torch.testing.assert_close(out, torch.tensor([50**0.5 + 0.5, 0.25]))


def test_standardisation_ignores_scale_and_offset_of_each_filter():
    torch.manual_seed(0)
    layer = WSConv2d(3, 4, 3).double()
    before = layer.standardized_weight()
    torch.testing.assert_close(before.sum((1, 2, 3)), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(before.square().sum((1, 2, 3)), torch.ones(4, dtype=torch.float64))
    with torch.no_grad():
        layer.weight.mul_(torch.arange(1.0, 5).reshape(4, 1, 1, 1)).add_(2)
    torch.testing.assert_close(layer.standardized_weight(), before)
