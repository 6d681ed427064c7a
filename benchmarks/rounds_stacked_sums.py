"""Clipped sums of a stack of clients at once, by hand, for the stacked loop.

The gradient of an example is not made if its norm takes less work from ``a`` and the gradient at ``z`` of each layer
``z = w a + b`` (Lee and Kifer 2021, arXiv 2009.03106); the clipped sum is then one product for all examples of a
client. A convolution is such a layer with a row for each position.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def taps_last(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Where each number of a row comes from, in the order of torch, and back: of filters ``[O, 3, 3, C]`` is read."""
    order, begin = [], 0
    for p in module.parameters():
        places = torch.arange(begin, begin + p.numel()).view(p.shape)
        order.append(places.movedim(1, -1).flatten() if p.ndim == 4 else places.flatten())
        begin += p.numel()
    return torch.cat(order), torch.cat(order).argsort()


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer ``z = w a + b`` of ``P`` positions: ``a[K, B, P, I]``, ``z[K, B, O, P]``, and its place in a row."""

    a: Tensor
    z: Tensor
    weights: slice
    bias: slice


def clipped_sums(
    module: nn.Module, at: Tensor, inputs: Tensor, targets: Tensor, real: Tensor, clip_norm: float
) -> Tensor:
    """Sums ``[K, d]`` of clipped gradients at ``at[K, d]`` over the ``inputs[K, B, ...]`` that are ``real[K, B]``."""
    layers, logits = _forward(module, at, inputs)
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    slopes = torch.autograd.grad(loss, [layer.z for layer in layers])
    rows = [_rows(layer, slope) for layer, slope in zip(layers, slopes, strict=True)]
    squares = sum(_squares(*each) for each in zip(layers, slopes, rows, strict=True))
    factors = (clip_norm / squares.sqrt()).clamp_(max=1).where(real, 0)
    sums = torch.empty_like(at)
    for layer, slope, row in zip(layers, slopes, rows, strict=True):
        if row is None:
            clipped = (slope * factors[:, :, None, None]).transpose(1, 2).flatten(2)
            of_weights, of_bias = clipped @ layer.a.flatten(1, 2), clipped.sum(2)
        else:
            of_weights = (factors[:, None] @ row.flatten(2)).view(len(at), *row.shape[2:])
            of_bias = (factors[:, None] @ slope.sum(3))[:, 0]
        sums[:, layer.weights] = of_weights.flatten(1)
        sums[:, layer.bias] = of_bias
    return sums


def _rows(layer: _Layer, slope: Tensor) -> Tensor | None:
    """The gradient of each example for the weights, ``[K, B, O, I]``, of a layer where that is the least work."""
    positions, outputs, width = slope.shape[3], slope.shape[2], layer.a.shape[3]
    return slope @ layer.a if positions * (width + outputs) >= width * outputs else None


def _squares(layer: _Layer, slope: Tensor, row: Tensor | None) -> Tensor:
    """Squared norms ``[K, B]`` of the gradient of each example for weights and bias."""
    if row is not None:
        return row.square().sum((2, 3)) + slope.sum(3).square().sum(2)
    if layer.a.shape[2] == 1:
        return (layer.a.square().sum((2, 3)) + 1) * slope.square().sum((2, 3))
    return ((layer.a @ layer.a.mT + 1) * (slope.mT @ slope)).sum((2, 3))


def _forward(module: nn.Module, at: Tensor, inputs: Tensor) -> tuple[list[_Layer], Tensor]:
    """The layers with parameters, and logits ``[K * B, classes]``."""
    count, batch = inputs.shape[:2]
    x, begin, layers = inputs.flatten(0, 1), 0, list[_Layer]()
    for part in module.children():
        if isinstance(part, nn.AvgPool2d):
            x = _halved(x)
        elif isinstance(part, nn.Linear | nn.Conv2d):
            size = x.shape[2:]
            middle = begin + part.weight.numel()
            end = middle + part.weight.shape[0]
            weights = at[:, begin:middle].unflatten(1, (part.weight.shape[0], -1))
            a = (_Patches.apply(x) if size else x).view(count, batch, -1, weights.shape[2])
            z = torch.baddbmm(at[:, None, middle:end], a.flatten(1, 2), weights.mT)
            z = z.unflatten(1, (batch, -1)).mT.contiguous()
            if not layers:
                z.requires_grad_()
            layers.append(_Layer(a=a.detach(), z=z, weights=slice(begin, middle), bias=slice(middle, end)))
            x, begin = z.view(count * batch, -1, *size), end
        else:
            x = part(x)
    return layers, x


def _halved(x: Tensor) -> Tensor:
    """Means of 2x2, as a product, which is faster than ``avg_pool2d`` of small images."""
    height, width = x.shape[2:]
    rows, columns = (torch.eye(n // 2).repeat_interleave(2, 0) / 2 for n in (height, width))
    return (x.flatten(2) @ torch.kron(rows, columns)).unflatten(2, (height // 2, width // 2))


class _Patches(torch.autograd.Function):
    """``x[N, C, H, W]`` to patches of 3x3 around each position, ``[N, H, W, 3 * 3 * C]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """A copy with zeros around, read nine times."""
        count, channels, height, width = x.shape
        padded = x.new_zeros(count, height + 2, width + 2, channels)
        padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
        return padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        """Each tap back to its place."""
        count, height, width, _ = slope.shape
        taps = slope.unflatten(3, (3, 3, -1))
        found = slope.new_zeros(count, height, width, taps.shape[-1])
        for i, j in itertools.product(range(3), range(3)):
            (to_h, from_h), (to_w, from_w) = _within(i, height), _within(j, width)
            found[:, to_h, to_w] += taps[:, from_h, from_w, i, j]
        return found.permute(0, 3, 1, 2)


def _within(tap: int, size: int) -> tuple[slice, slice]:
    """Where a tap reads, and for which positions, within an image of ``size``."""
    low, high = max(0, tap - 1), min(size, size + tap - 1)
    return slice(low, high), slice(low - tap + 1, high - tap + 1)
