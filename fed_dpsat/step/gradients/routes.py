"""Which torch function is which layer, and by which strategy: the static plan, with compiled ``kernels`` or without.

A route is given the function's arguments, the input as ``x[B, *]`` for all examples. It answers None for a call that
has no layer: then torch's own operation is used, example by example, with the parameters in the open."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.step.gradients import compiled, conv, linear
from fed_dpsat.step.gradients.capture import Call, Route
from fed_dpsat.step.gradients.contribution import Unplanned
from fed_dpsat.step.gradients.embedding import Embedding
from fed_dpsat.step.gradients.formats import is_channels_last
from fed_dpsat.step.gradients.geometry import Geometry
from fed_dpsat.step.gradients.loss import ModelLoss
from fed_dpsat.step.gradients.norm import GroupNorm, LayerNorm
from fed_dpsat.step.placement import is_card
from fed_dpsat.step.query import LossFn

Size = int | tuple[int, ...] | list[int]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    if input.ndim < 2 or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    strategy = linear.choose(math.prod(input.shape[1:-1]), weight.shape[1], weight.shape[0])
    return Call(name="linear", layer=linear.Linear(strategy=strategy), x=input, weight=weight, bias=bias)


def _convolution(dimensions: int, kernels: bool) -> Route:
    def route(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
    ) -> Call | None:
        name = f"conv{dimensions}d"
        if input.ndim != dimensions + 2:
            return None
        shape, dilations = tuple(weight.shape), _sizes(dilation, dimensions)
        uneven: tuple[int, ...] = ()
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilations, shape[2:], strict=True)]
            uneven = tuple(t % 2 for t in totals)
            padding = tuple(t // 2 for t in totals)
        geometry = Geometry(
            shape=shape,
            stride=_sizes(stride, dimensions),
            padding=_sizes(0 if isinstance(padding, str) else padding, dimensions),
            dilation=dilations,
            groups=groups,
        )
        sides, card = (
            tuple(n + more for n, more in zip(input.shape[2:], uneven or [0] * dimensions, strict=True)),
            is_card(input.device),
        )
        ours = kernels and geometry.compiles and compiled.suit(input)
        strategy = conv.choose(geometry, sides, is_channels_last(input), card, ours)
        layer = conv.Convolution(geometry=geometry, strategy=strategy, derived=not weight.is_leaf, uneven=uneven)
        return Call(name=name, layer=layer, x=input, weight=weight, bias=bias)

    return route


def _group_norm(kernels: bool) -> Route:
    def route(
        input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Call:
        layer = GroupNorm(groups=num_groups, eps=eps, kernels=kernels and compiled.suit(input))
        return Call(name="group_norm", layer=layer, x=input, weight=weight, bias=bias)

    return route


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Call | None:
    layer = LayerNorm(shape=tuple(normalized_shape), eps=eps)
    if input.ndim <= len(layer.shape):
        return None
    return Call(name="layer_norm", layer=layer, x=input, weight=weight, bias=bias)


def _instance_norm(kernels: bool) -> Route:
    def route(
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Call:
        if running_mean is not None or running_var is not None or not use_input_stats:
            raise Unplanned("instance_norm with running statistics")
        layer = GroupNorm(groups=input.shape[1], eps=eps, kernels=kernels and compiled.suit(input))
        return Call(name="instance_norm", layer=layer, x=input, weight=weight, bias=bias)

    return route


def _matmul(input: Tensor, other: Tensor) -> Call | None:
    return _linear(input, other.t()) if other.ndim == 2 else None


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise Unplanned("embedding with max_norm, scale_grad_by_freq or sparse")
    words = weight.shape[0]
    padding = -1 if padding_idx is None else padding_idx % words
    return Call(name="embedding", layer=Embedding(words=words, padding=padding), x=input, weight=weight, bias=None)


def _sizes(size: Size, dimensions: int) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * dimensions if len(sizes) == 1 else sizes


Routes = dict[Callable[..., Any], Route]

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


def routes_of(loss_fn: LossFn) -> Routes:
    """By function; a ``ModelLoss`` says with which kernels."""
    kernels = loss_fn.kernels if isinstance(loss_fn, ModelLoss) else "auto"
    return _routes(compiled.decided(kernels) == "compiled")


@functools.cache
def _routes(kernels: bool) -> Routes:
    return {
        functional.linear: _linear,
        **dict.fromkeys(PRODUCTS, _matmul),
        torch.conv1d: _convolution(1, kernels),
        torch.conv2d: _convolution(2, kernels),
        torch.conv3d: _convolution(3, kernels),
        functional.group_norm: _group_norm(kernels),
        functional.layer_norm: _layer_norm,
        functional.instance_norm: _instance_norm(kernels),
        functional.embedding: _embedding,
    }


TABLES: Routes = {functional.embedding: _embedding}
"""What has a layer also if all else is in the open."""
