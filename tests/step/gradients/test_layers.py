"""Layers by themselves, in either memory format, against one example at a time in float64."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fed_dpsat.models.cnn import tanh_cnn_small
from fed_dpsat.models.dpnasnet import dpnasnet_cifar
from fed_dpsat.models.resnet import resnet20_gn, wrn16_4_gn
from fed_dpsat.params import trainable
from fed_dpsat.step.gradients import conv, patches, planned
from fed_dpsat.step.gradients.finite import filter_squares, squared_norm_rows
from fed_dpsat.step.gradients.formats import alike, is_channels_last, laid_out
from fed_dpsat.step.gradients.norm import GroupNorm, LayerNorm
from fed_dpsat.step.gradients.per_example import ModelLoss

SEEDS = st.integers(0, 2**31 - 1)


def one_by_one(function, x, grad, *params):
    """Gradients ``[B, ...]`` of the input and of each parameter of ``function(x, *params)``."""
    rows = []
    for example, slope in zip(x, grad, strict=True):
        leaves = [t.detach().contiguous().requires_grad_() for t in (example[None], *params)]
        found = torch.autograd.grad(function(*leaves), leaves, slope[None])
        rows.append([found[0][0], *found[1:]])
    return [torch.stack(each) for each in zip(*rows, strict=True)]


@pytest.mark.parametrize("channels_last", [False, True])
@settings(max_examples=25)
@given(
    seed=SEEDS,
    batch=st.integers(1, 5),
    groups=st.integers(1, 4),
    width=st.integers(1, 3),
    sides=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    need_input=st.booleans(),
)
def test_group_norm(channels_last, seed, batch, groups, width, sides, need_input):
    """Sums by torch's own pass where channels have planes, by hand where they are last."""
    assume(width * math.prod(sides) > 1)
    torch.manual_seed(seed)
    x, grad = torch.randn(2, batch, groups * width, *sides, dtype=torch.float64).unbind(0)
    weight, bias = torch.randn(2, groups * width, dtype=torch.float64)
    x = laid_out(x, channels_last)
    layer = GroupNorm(groups=groups, eps=1e-3)
    out, saved = layer.forward(x, weight, bias)
    gradient, found = layer.backward(grad, weight, saved, need_input, ("weight", "bias"))
    expected = one_by_one(lambda x, w, b: nn.functional.group_norm(x, groups, w, b, 1e-3), x, grad, weight, bias)
    torch.testing.assert_close(out, nn.functional.group_norm(x.contiguous(), groups, weight, bias, 1e-3))
    assert (gradient is not None) == need_input
    if gradient is not None:
        torch.testing.assert_close(gradient, expected[0])
    torch.testing.assert_close(found["weight"].rows(), expected[1])
    torch.testing.assert_close(found["bias"].rows(), expected[2])


@pytest.mark.parametrize("few_bytes", [1, 10**6])
def test_group_norm_a_few_examples_at_a_time(few_bytes, monkeypatch):
    monkeypatch.setattr("fed_dpsat.step.gradients.norm.FEW_BYTES", few_bytes)
    torch.manual_seed(0)
    x, grad = (laid_out(t, True) for t in torch.randn(2, 5, 4, 3, 7).unbind(0))
    weight, layer = torch.randn(4), GroupNorm(groups=2, eps=1e-5)
    _, saved = layer.forward(x, weight, None)
    gradient, found = layer.backward(grad, weight, saved, True, ("weight",))
    expected = one_by_one(lambda x, w: nn.functional.group_norm(x, 2, w), x, grad, weight)
    torch.testing.assert_close(gradient, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["weight"].rows(), expected[1], rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(
    SEEDS,
    st.integers(1, 4),
    st.lists(st.integers(1, 5), max_size=2),
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
)
def test_layer_norm(seed, batch, between, shape):
    torch.manual_seed(seed)
    x, grad = torch.randn(2, batch, *between, *shape, dtype=torch.float64).unbind(0)
    weight, bias = torch.randn(2, *shape, dtype=torch.float64).unbind(0)
    layer = LayerNorm(shape=tuple(shape), eps=1e-3)
    _, saved = layer.forward(x, weight, bias)
    gradient, found = layer.backward(grad, weight, saved, True, ("weight", "bias"))
    expected = one_by_one(lambda x, w, b: nn.functional.layer_norm(x, shape, w, b, 1e-3), x, grad, weight, bias)
    for got, wanted in zip((gradient, found["weight"].rows(), found["bias"].rows()), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("strategy", ["channels", "rows"])
@settings(max_examples=10)
@given(
    seed=SEEDS,
    groups=st.integers(1, 3),
    width=st.sampled_from([3, 8]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    kernel=st.integers(1, 3),
)
def test_a_few_examples_at_a_time(channels_last, strategy, step, seed, groups, width, stride, padding, kernel):
    """However few at a time, in either format; with an example that is not finite among them."""
    torch.manual_seed(seed)
    geometry = conv.Geometry(
        shape=(2 * groups, width, kernel, kernel),
        stride=(stride,) * 2,
        padding=(padding,) * 2,
        dilation=(1, 1),
        groups=groups,
    )
    x = laid_out(torch.randn(5, width * groups, 5, 6, dtype=torch.float64), channels_last)
    weight = torch.randn(geometry.shape, dtype=torch.float64)
    grad = alike(torch.randn(5, 2 * groups, *geometry.positions((5, 6)), dtype=torch.float64), x)
    expected = one_by_one(lambda x, w: nn.functional.conv2d(x, w, None, stride, padding, 1, groups), x, grad, weight)[1]
    layer = conv.Convolution(geometry=geometry, strategy=strategy, derived=True)
    patches_bytes = 8 * math.prod(geometry.positions((5, 6))) * weight[0].numel() * groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "_abreast", lambda *_: step)
        patch.setattr(conv, "PATCHES_BYTES", step * patches_bytes)
        _, found = layer.backward(grad, weight, (x,), False, ("weight",))
    held = found["weight"]
    torch.testing.assert_close(held.rows(), expected)
    torch.testing.assert_close(held.squared_norms(), expected.flatten(1).square().sum(1))
    factors, finite = torch.rand(5, dtype=torch.float64), torch.tensor([True, False, True, True, True])
    torch.testing.assert_close(held.weighted_sum(factors, None), torch.tensordot(factors, expected, 1))
    torch.testing.assert_close(held.weighted_sum(factors, finite), torch.tensordot(factors * finite, expected, 1))
    parts = getattr(held, "parts", [held])
    for part, rows in zip(parts, expected.split(step if len(parts) > 1 else 5), strict=True):
        if part.filters is None:  # of single pixels, which are made at once
            assert strategy == "rows"
            assert kernel == 1
            continue
        squares, sums, along = part.filters
        torch.testing.assert_close(squares, rows.flatten(2).square().sum(2))
        torch.testing.assert_close(sums, rows.flatten(2).sum(2))
        torch.testing.assert_close(along, (rows * weight).flatten(2).sum(2))


@pytest.mark.parametrize("channels_last", [False, True])
@settings(max_examples=25)
@given(SEEDS, *[st.integers(1, 5)] * 3, *[st.integers(1, 3)] * 3, st.integers(0, 2))
def test_gram_matrices_of_patches_from_those_of_pixels(
    channels_last, seed, channels, height, width, high, wide, dilation, padding
):
    torch.manual_seed(seed)
    x = laid_out(torch.randn(2, channels, height + 6, width + 6, dtype=torch.float64), channels_last)
    geometry = conv.Geometry(
        shape=(1, channels, high, wide),
        stride=(1, 1),
        padding=(padding, padding),
        dilation=(dilation, dilation),
        groups=1,
    )
    rows = nn.functional.unfold(x, (high, wide), dilation, padding)
    torch.testing.assert_close(patches.gram(geometry, x), rows.transpose(1, 2) @ rows)


@pytest.mark.parametrize("width", [65, 1024, 1152, 2304, 1031])
def test_squares_of_filters_do_not_lose_what_the_bound_needs(width):
    """Equal numbers, whose float32 sum drifts one way; 1031 is prime."""
    rows = torch.full((2, 3, width), 0.1)
    exact = float(rows[0, 0, 0].double()) ** 2 * width
    assert filter_squares(rows)[1, 2] == pytest.approx(exact, rel=1e-6)
    assert squared_norm_rows(rows)[1] == pytest.approx(3 * exact, rel=1e-6)


def test_a_format_is_known_by_the_stride_of_the_channels():
    one_channel = torch.randn(2, 1, 4, 5)
    assert not is_channels_last(one_channel)
    assert is_channels_last(laid_out(one_channel, True))
    assert torch.equal(laid_out(one_channel, True), one_channel)
    gaps = torch.randn(2, 3, 4, 10)[..., ::2]
    assert laid_out(gaps, True).is_contiguous(memory_format=torch.channels_last)
    assert laid_out(laid_out(gaps, True), False).is_contiguous()


@pytest.mark.parametrize(
    ("make", "channels_last"),
    [(tanh_cnn_small, True), (dpnasnet_cifar, True), (wrn16_4_gn, True), (resnet20_gn, False)],
)
def test_narrow_networks_with_affine_norms_have_planes(make, channels_last):
    module = make((3, 32, 32), 10)
    loss, batch = ModelLoss(module, kernels="torch"), (torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert planned.channels_last(loss, trainable(module), *batch) == channels_last
