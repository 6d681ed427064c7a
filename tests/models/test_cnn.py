import pytest
import torch
from torch import nn

from fed_dpsat.models.cnn import tanh_cnn, tanh_cnn_small


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_papernot_count_layer_by_layer():
    channels = [(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    convolutions = sum(9 * i * o + o for i, o in channels)
    linears = 128 * 4 * 4 * 128 + 128 + 128 * 10 + 10
    assert convolutions + linears == parameters(tanh_cnn((3, 32, 32), 10)) == 550_570


def test_order_of_the_layers():
    papernot = "Conv2d Tanh Conv2d Tanh AvgPool2d " * 3 + "Flatten Linear Tanh Linear"
    small = "Conv2d GroupNorm Tanh AvgPool2d " * 3 + "Flatten Linear"
    assert [type(layer).__name__ for layer in tanh_cnn((3, 8, 8), 10)] == papernot.split()
    assert [type(layer).__name__ for layer in tanh_cnn_small((3, 8, 8), 10)] == small.split()


@pytest.mark.parametrize(
    ("shape", "count"),
    [((1, 8, 8), 23_946), ((1, 9, 15), 23_946), ((1, 28, 28), 29_066), ((3, 32, 32), 33_834)],
)
def test_small_count_and_pooling_that_rounds_down(shape, count):
    model = tanh_cnn_small(shape, 10)
    assert parameters(model) == count
    assert model(torch.zeros(1, *shape)).shape == (1, 10)


def test_widths_set_depth_and_channels():
    model = tanh_cnn_small((1, 4, 4), 10, widths=(8, 24))
    assert parameters(model) == (9 * 8 + 8) + (9 * 8 * 24 + 24) + (24 * 10 + 10)


def test_small_ignores_scale_and_offset_of_a_convolution():
    """GroupNorm's property: the first convolution times 3 plus 2 on every channel gives the same logits."""
    torch.manual_seed(0)
    model = tanh_cnn_small((1, 8, 8), 10).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        model[0].weight *= 3
        model[0].bias.mul_(3).add_(2)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model[0].bias[0] += 5
    assert not torch.allclose(model(x), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factory", [tanh_cnn, tanh_cnn_small])
@pytest.mark.parametrize("shape", [(64,), (1, 7, 8), (1, 8, 7)])
def test_vectors_and_small_images_are_refused(factory, shape):
    with pytest.raises(ValueError, match=r"model='tanh-cnn.*is not \(C, H, W\) .* at least 8; use 'mlp'"):
        factory(shape, 10)


@pytest.mark.parametrize("widths", [(), (16, 12), (0,), (-8,)])
def test_widths_that_the_groups_do_not_divide_are_refused(widths):
    with pytest.raises(ValueError, match=r"not multiples of 8.*use for instance \(16, 32, 64\)"):
        tanh_cnn_small((1, 32, 32), 10, widths=widths)
