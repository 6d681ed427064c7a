"""Convolutions in one, two and three dimensions: five exact ways to per-example gradients, channels last.

============ =========================================================== =====================================
strategy     how                                                         cheap for
============ =========================================================== =====================================
``product``  norms from Gram matrices of patches, then one ordinary      many channels, few positions
             weight gradient of weighted outputs
``lines``    batched product of outputs and patches, few images at a     few channels, many positions
             time and one line of the kernel after another
``rows``     batched product of outputs and patches                      three dimensions
``single``   the weight gradient of one image at a time                  groups
``channels`` one depthwise weight gradient, examples side by side        depthwise, many channels, few positions
============ =========================================================== =====================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fed_dpsat.engines import patches
from fed_dpsat.engines.contribution import Contribution, Rows
from fed_dpsat.engines.finite import squared_norm_rows
from fed_dpsat.engines.linear import Roles
from fed_dpsat.engines.product import gram, gram_norms, product


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a convolution is, but for its batch: sizes per dimension, ``shape`` that of the weight."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel."""
        return self.shape[2:]

    def positions(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Sides of the output, for an input with these sides."""
        return tuple(
            (side + 2 * p - d * (k - 1) - 1) // s + 1
            for side, p, d, k, s in zip(sides, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """``x[B, C, *] -> [B, O, *]``."""

    geometry: Geometry
    strategy: str

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what the backward pass needs of ``x``."""
        x = channels_last(x)
        return torch.convolution(x, channels_last(weight), bias, *self._settings()), (x,)

    def backward(
        self, grad: Tensor, weight: Tensor, saved: tuple[Tensor, ...], need_input: bool, roles: tuple[str, ...]
    ) -> tuple[Tensor | None, Roles]:
        """Gradient of the input, and the contributions to the parameters in ``roles``."""
        (x,) = saved
        grad, found = channels_last(grad), {}
        if "weight" in roles:
            found["weight"] = STRATEGIES[self.strategy](self, x, grad)
        if "bias" in roles:
            found["bias"] = Rows(data=grad.flatten(2).sum(2))
        if not need_input:
            return None, found
        return self._gradient(x, grad, channels_last(weight), (True, False, False))[0], found

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of ``x`` with another weight of the same kernel."""
        return torch.convolution(channels_last(x), channels_last(weight), None, *self._settings())

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """The ordinary weight gradient of a batch, a sum."""
        weight = channels_last(x.new_empty(1).expand(self.geometry.shape))
        gradient: Tensor = self._gradient(x, grad, weight, (False, True, False))[1]
        return gradient

    def _settings(self) -> tuple[Any, ...]:
        g = self.geometry
        return g.stride, g.padding, g.dilation, False, (0,) * len(g.stride), g.groups

    def _gradient(self, x: Tensor, grad: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> Any:
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *self._settings(), wanted)

    def each(self, x: Tensor, grad: Tensor) -> Tensor:
        """Per-example weight gradients ``[B, *shape]``."""
        return _lines(self, x, grad).rows()


def choose(geometry: Geometry, sides: tuple[int, ...]) -> str:
    """The cheapest strategy by a count of multiplications: the same on every machine, so are the bits.

    Weights were fitted to times on one core with AVX-512; ``fed-dpsat plan`` shows times beside choices.
    """
    out, inputs, kernel = geometry.shape[0], geometry.shape[1], math.prod(geometry.kernel)
    if geometry.groups > 1:
        depthwise = inputs == 1 and out == geometry.groups and len(sides) == 2
        return "channels" if depthwise and math.prod(sides) <= 256 else "single"
    if len(sides) != 2:
        return "rows"
    positions = math.prod(geometry.positions(sides))
    gram = positions * positions * (inputs * kernel + out)
    worth = 0.58 if kernel > 1 else 0.4
    return "product" if gram < worth * positions * inputs * kernel * out else "lines"


def fitting(geometry: Geometry) -> list[str]:
    """The strategies that are right for a convolution, cheap or not."""
    if len(geometry.kernel) != 2:
        return ["rows", "single"]
    if geometry.groups == 1:
        return ["product", "lines", "rows", "single"]
    depthwise = geometry.shape[1] == 1 and geometry.shape[0] == geometry.groups
    return ["rows", "single", *(["channels"] if depthwise else [])]


def channels_last(x: Tensor) -> Tensor:
    """``x`` with its channels side by side in memory, where torch has a name for that."""
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 else x.contiguous()


def _product(layer: Convolution, x: Tensor, grad: Tensor) -> Contribution:
    outputs = grad.flatten(2).transpose(1, 2)
    inputs_gram = patches.gram(layer.geometry, x)
    return product(
        x,
        grad,
        of=layer.weight_gradient,
        each=layer.each,
        norms=gram_norms(inputs_gram, gram(outputs)),
        inputs_gram=inputs_gram,
        apply=layer.apply,
    )


def _single(layer: Convolution, x: Tensor, grad: Tensor) -> Contribution:
    weight = channels_last(x.new_empty(1).expand(layer.geometry.shape))
    one_by_one = [
        layer._gradient(x[i : i + 1], grad[i : i + 1], weight, (False, True, False))[1] for i in range(len(x))
    ]
    return Rows(data=torch.stack(one_by_one))


def _lines(layer: Convolution, x: Tensor, grad: Tensor) -> Contribution:
    g, batch = layer.geometry, len(x)
    (high, wide), (out, channels) = g.kernel, g.shape[:2]
    parts = patches.slices(g)
    data = x.new_empty(batch, parts, out, high * wide // parts * channels)
    norms, outputs = x.new_empty(batch, dtype=torch.float64), grad.flatten(2)
    for examples, views in patches.buffers(g, x):
        some, rows = outputs[examples], data[examples]
        for view, part in zip(views, rows.unbind(1), strict=True):
            torch.bmm(some, view, out=part)
        norms[examples] = squared_norm_rows(rows)  # while they are in the cache

    def to_shape(rows: Tensor) -> Tensor:
        apart = rows.view(-1, parts, out, high // parts, wide, channels)
        return apart.permute(0, 2, 5, 1, 3, 4).reshape(-1, *g.shape)

    return Rows(data=data, to_shape=to_shape, norms=norms)


def _rows(layer: Convolution, x: Tensor, grad: Tensor) -> Contribution:
    g = layer.geometry
    batch, groups, out = len(x), g.groups, g.shape[0] // g.groups
    inputs = patches.unfold(g, x)
    outputs = grad.flatten(2).view(batch, groups, out, -1) if groups > 1 else grad.flatten(2)[:, None]
    data = torch.matmul(outputs, inputs)

    def to_shape(rows: Tensor) -> Tensor:
        apart = rows.view(-1, groups * out, math.prod(g.kernel), g.shape[1])
        return apart.transpose(2, 3).reshape(-1, *g.shape)

    return Rows(data=data, to_shape=to_shape)


def _channels(layer: Convolution, x: Tensor, grad: Tensor) -> Contribution:
    batch, g = len(x), layer.geometry
    wide = Convolution(
        geometry=Geometry(
            shape=(batch * g.shape[0], *g.shape[1:]),
            stride=g.stride,
            padding=g.padding,
            dilation=g.dilation,
            groups=batch * g.groups,
        ),
        strategy="",
    )
    rows = wide.weight_gradient(patches.side_by_side(x), patches.side_by_side(grad))
    return Rows(data=rows.reshape(batch, *g.shape))


STRATEGIES = {"product": _product, "lines": _lines, "single": _single, "rows": _rows, "channels": _channels}
