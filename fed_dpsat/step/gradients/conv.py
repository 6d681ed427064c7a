"""Convolutions in one, two and three dimensions: five exact ways to per-example gradients.

============ =========================================================== =====================================
strategy     how                                                         cheap for
============ =========================================================== =====================================
``product``  norms from Gram matrices of patches, then one ordinary      many channels, few positions
             weight gradient of weighted outputs
``compiled`` a kernel of our own (``kernels_source``)                    two dimensions, where C compiles
``channels`` one grouped weight gradient for a few examples side by      two dimensions, many positions
             side as channels
``rows``     batched product of outputs and patches                      kernels of 1x1; other dimensions
``single``   the weight gradient of one image at a time                  groups in other dimensions
============ =========================================================== =====================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.step.gradients import compiled, patches
from fed_dpsat.step.gradients.contribution import Contribution, Rows, together, wide
from fed_dpsat.step.gradients.finite import filter_squares
from fed_dpsat.step.gradients.formats import alike, dense, is_channels_last, laid_out, unset
from fed_dpsat.step.gradients.geometry import Geometry
from fed_dpsat.step.gradients.linear import Roles
from fed_dpsat.step.gradients.product import gram, gram_norms, product
from fed_dpsat.step.placement import bytes_at_once

ABREAST_BYTES, ABREAST_CHANNELS = 1_800_000, 512
PATCHES_BYTES = 1_200_000

NARROW_VECTORS = "AVX512" not in torch.backends.cpu.get_cpu_capability()
"""Where vectors are narrow, MKL's products are as fast as oneDNN's convolutions; else they reach a third of it."""

FEW_CHANNELS = 8
"""oneDNN fills planes up to 16 of them, group by group; the channels of colour images are better off last."""


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """``x[B, C, *] -> [B, O, *]``; the weight of a ``derived`` one is a function of parameters.

    ``uneven`` is by how many zeros more each side is padded at its end than at its beginning.
    """

    geometry: Geometry
    strategy: str
    derived: bool = False
    uneven: tuple[int, ...] = ()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what the backward pass needs of ``x``."""
        if any(self.uneven):
            x = functional.pad(x, [n for more in reversed(self.uneven) for n in (0, more)])
        x = dense(x)
        if not self.derived or self.strategy != "product":
            return torch.convolution(x, alike(weight, x), bias, *self._settings()), (x,)
        made = torch.convolution(x, alike(weight, x), None, *self._settings())
        return (made.clone() if bias is None else made + bias.view(-1, 1, 1)), (x, made)

    def backward(
        self, grad: Tensor, weight: Tensor, saved: tuple[Tensor, ...], need_input: bool, roles: tuple[str, ...]
    ) -> tuple[Tensor | None, Roles]:
        """Gradient of the input, and the contributions to the parameters in ``roles``."""
        x, made = saved[0], saved[1] if len(saved) > 1 else None
        grad, found = alike(grad, x), {}
        if "weight" in roles:
            found["weight"] = STRATEGIES[self.strategy](self, x, grad, weight, made)
        if "bias" in roles:
            found["bias"] = Rows(data=self._position_sums(wide(grad)))
        if not need_input:
            return None, found
        gradient = self._gradient(x, grad, alike(weight, x), (True, False, False))[0]
        for side, more in enumerate(self.uneven, start=2):
            gradient = gradient.narrow(side, 0, gradient.shape[side] - more)
        return gradient, found

    def _position_sums(self, grad: Tensor) -> Tensor:
        ours = self.strategy == "compiled" and is_channels_last(grad)
        return compiled.position_sums(grad) if ours else grad.flatten(2).sum(2)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of ``x`` with another weight of the same kernel."""
        x = dense(x)
        return torch.convolution(x, alike(weight, x), None, *self._settings())

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """The ordinary weight gradient of a batch, a sum."""
        weight = unset(self.geometry.shape, x)  # only its shape is looked at
        gradient: Tensor = self._gradient(x, grad, weight, (False, True, False))[1]
        return gradient

    def _settings(self) -> tuple[Any, ...]:
        g = self.geometry
        return g.stride, g.padding, g.dilation, False, (0,) * len(g.stride), g.groups

    def _gradient(self, x: Tensor, grad: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> Any:
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *self._settings(), wanted)

    def each(self, x: Tensor, grad: Tensor) -> Tensor:
        """Per-example weight gradients ``[B, *shape]``."""
        return _rows(replace(self, derived=False), x, grad, x, None).rows()


def choose(
    geometry: Geometry, sides: tuple[int, ...], channels_last: bool, card: bool = False, kernels: bool = False
) -> str:
    """The cheapest strategy by a count of multiplications: the same on all machines with the same vectors.

    With ``kernels`` it may be ``compiled``.

    Weights were fitted to times on one core with AVX-512, and on one with AVX2; ``fed-dpsat plan`` shows times beside
    choices. A ``card`` works on all examples at once: there it is ``rows``, or ``product`` where that multiplies less.
    """
    if card and (len(sides) != 2 or geometry.groups > 1):
        return "rows"
    if kernels and geometry.groups > 1:
        return "compiled"
    if len(sides) != 2:
        return "single" if geometry.groups > 1 else "rows"
    if geometry.groups > 1:
        return "channels"
    out, inputs, kernel = geometry.shape[0], geometry.shape[1], math.prod(geometry.kernel)
    positions, weights = math.prod(geometry.positions(sides)), out * inputs * kernel
    ordinary = positions * weights
    if card:
        return "product" if patches.gram_cost(geometry, sides) + positions**2 * (out + 80) < ordinary else "rows"
    product = ordinary + 2.5 * (patches.gram_cost(geometry, sides) + positions**2 * (out + 80))
    if kernels:
        return "product" if product < ordinary + 80 * weights else "compiled"
    if NARROW_VECTORS and kernel > 1:
        spread = channels_last or inputs < FEW_CHANNELS
        rows = 0.8 * ordinary + 18 * positions * inputs * kernel + 55 * weights
        rows += 0 if spread else 55 * inputs * math.prod(sides)
        abreast = 1.4 * ordinary + 65 * weights + (35 * positions * (inputs + out) if spread else 0)
        costs = {"rows": rows, "channels": abreast, "product": product}
        return min(costs, key=costs.__getitem__)
    rows = 2.5 * ordinary if kernel == 1 else ordinary + (150 if channels_last else 110) * weights
    return "product" if product < rows else "rows" if kernel == 1 else "channels"


def fitting(geometry: Geometry, x: Tensor) -> list[str]:
    """The strategies that are right for a convolution of ``x``, cheap or not."""
    if len(geometry.kernel) != 2:
        return ["rows", "single"]
    own = ["compiled"] if geometry.compiles and compiled.suit(x) and not compiled.refusal() else []
    return [*(["product"] if geometry.groups == 1 else []), *own, "channels", "rows", "single"]


def _product(layer: Convolution, x: Tensor, grad: Tensor, weight: Tensor, made: Tensor | None) -> Contribution:
    x, grad = wide(x), wide(grad)
    outputs = grad.flatten(2).transpose(1, 2)
    inputs_gram = patches.gram(layer.geometry, x)
    return product(
        x,
        grad,
        of=layer.weight_gradient,
        each=layer.each,
        together=lambda x, grad, rows: _channels(layer, x, grad, weight, made, rows),
        norms=gram_norms(inputs_gram, gram(outputs)),
        inputs_gram=inputs_gram,
        apply=layer.apply,
        made=None if made is None else wide(made),
    )


def _compiled(layer: Convolution, x: Tensor, grad: Tensor, weight: Tensor, made: Tensor | None) -> Contribution:
    g, (x, grad) = layer.geometry, (laid_out(wide(t), True) for t in (x, grad))
    filters = wide(weight).permute(2, 3, 1, 0).contiguous() if layer.derived else None
    moves = g.stride, g.padding, g.dilation
    data, squares, sums, along = compiled.conv_weights(
        x, grad, g.kernel, *moves, depthwise=g.depthwise, filters=filters
    )

    def to_shape(rows: Tensor) -> Tensor:
        return rows.permute(0, 4, 3, 1, 2).contiguous()

    by_filter = (squares, sums.to(data), along.to(data)) if layer.derived else None
    return Rows(data=data, to_shape=to_shape, norms=squares.sum(1), filters=by_filter)


def _single(layer: Convolution, x: Tensor, grad: Tensor, weight: Tensor, made: Tensor | None) -> Contribution:
    weight = alike(weight, x)
    one_by_one = [
        layer._gradient(x[i : i + 1], grad[i : i + 1], weight, (False, True, False))[1] for i in range(len(x))
    ]
    return Rows(data=wide(torch.stack(one_by_one)))


def _rows(layer: Convolution, x: Tensor, grad: Tensor, weight: Tensor, made: Tensor | None) -> Contribution:
    g = layer.geometry
    if g.groups == 1 and not any(g.padding) and set(g.kernel) == {1}:
        return _pixels(g, x, grad)
    batch, groups, out, depth = len(x), g.groups, g.shape[0] // g.groups, math.prod(g.shape[1:])
    by_plane = groups == 1 and g.shape[1] < FEW_CHANNELS and math.prod(g.kernel) > 1
    spread = patches.windows_by_plane(g, x) if by_plane else patches.windows(g, x)
    outputs = grad.flatten(2).view(batch, groups, out, -1) if groups > 1 else grad.flatten(2)[:, None]
    positions = outputs.shape[-1]
    few = max(1, bytes_at_once(x.device, PATCHES_BYTES) // (groups * positions * depth * x.element_size()))
    data = wide(grad.new_empty(0)).new_empty(batch, groups * out, depth)
    filter_rows = wide(weight if by_plane else weight.movedim(1, -1)).flatten(1) if layer.derived else None
    shape = (depth, positions) if by_plane else (positions, depth)
    room, kept = x.new_empty(min(few, batch), groups * positions * depth), []
    for i in range(0, batch, few):
        some, found = spread[i : i + few], data[i : i + few]  # copied few at a time, patches stay in the cache
        inputs = room[: len(some)].view(some.shape).copy_(some).view(len(some) * groups, *shape)
        slopes = outputs[i : i + few].flatten(0, 1)
        if by_plane:  # the longer side first: MKL is slow where the last one is as short as 27
            found.copy_(torch.bmm(inputs, slopes.transpose(1, 2)).transpose(1, 2))
        elif found.dtype == slopes.dtype:
            torch.bmm(slopes, inputs, out=found.view(len(slopes), -1, depth))
        else:
            found.copy_(torch.bmm(slopes, inputs).view_as(found))
        kept.append(_summary(found, filter_rows))

    def to_shape(rows: Tensor) -> Tensor:
        if by_plane:
            return rows.view(-1, *g.shape)
        apart = rows.view(-1, groups * out, math.prod(g.kernel), g.shape[1])
        return apart.transpose(2, 3).reshape(-1, *g.shape)

    norms, filters = zip(*kept, strict=True)
    every: Any = tuple(torch.cat(part) for part in zip(*filters, strict=True)) if layer.derived else None
    return Rows(data=data, to_shape=to_shape, norms=torch.cat(norms), filters=every)


def _pixels(geometry: Geometry, x: Tensor, grad: Tensor) -> Contribution:
    """``_rows`` of a kernel of one pixel: products of what is there already."""
    used = x[(slice(None), slice(None), *(slice(None, None, step) for step in geometry.stride))]
    data = wide(torch.bmm(grad.flatten(2), used.flatten(2).transpose(1, 2)))
    return Rows(data=data, to_shape=lambda rows: rows.reshape(-1, *geometry.shape))


def _channels(
    layer: Convolution, x: Tensor, grad: Tensor, weight: Tensor, made: Tensor | None, rows: int = 1
) -> Contribution:
    """Of bundles of ``rows`` examples, whose gradients torch adds up as it does those of a batch."""
    g = layer.geometry
    if g.groups == 1 and x.shape[1] < FEW_CHANNELS:
        x, grad = laid_out(x, True), laid_out(grad, True)
    step, last = max(1, _abreast(g, x, grad) // rows) * rows, is_channels_last(x)

    def to_shape(found: Tensor) -> Tensor:
        if not last:
            return found.view(-1, *g.shape)
        return found.view(-1, g.shape[0], *g.kernel, g.shape[1]).permute(0, 1, 4, 2, 3)

    filter_rows = wide(weight.movedim(1, -1) if last else weight).flatten(1) if layer.derived else None
    parts = []
    for some, outputs in zip(torch.split(x, step), torch.split(grad, step), strict=True):
        count = len(some) // rows
        abreast = Convolution(
            geometry=replace(g, shape=(count * g.shape[0], *g.shape[1:]), groups=count * g.groups), strategy=""
        )
        found = abreast.weight_gradient(patches.side_by_side(some, rows), patches.side_by_side(outputs, rows))
        data = wide(found.permute(0, 2, 3, 1) if last else found).reshape(count, g.shape[0], -1)
        norms, filters = _summary(data, filter_rows)
        parts.append(Rows(data=data, to_shape=to_shape, norms=norms, filters=filters))
    return together(parts)


def _summary(data: Tensor, filter_rows: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Norms and, for a derived weight, ``filters`` of ``Rows``, while ``data[B, O, width]`` is in the cache."""
    squares = filter_squares(data)
    if filter_rows is None:
        return squares.sum(1), None
    return squares.sum(1), (squares, data.sum(2), (data * filter_rows).sum(2))


def _abreast(geometry: Geometry, x: Tensor, grad: Tensor) -> int:
    """How many examples side by side: their pixels stay within reach of one another, and all of them in the cache."""
    fit = bytes_at_once(x.device, ABREAST_BYTES) // ((x[0].numel() + grad[0].numel()) * x.element_size())
    if geometry.shape[1] > 1:
        most = ABREAST_CHANNELS if is_channels_last(x) else 2 * ABREAST_CHANNELS
        fit = min(fit, most // max(x.shape[1], grad.shape[1]))
    return max(1, fit)


STRATEGIES = {"product": _product, "compiled": _compiled, "channels": _channels, "rows": _rows, "single": _single}
