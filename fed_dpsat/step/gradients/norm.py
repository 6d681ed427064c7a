"""Normalisation layers: per-example gradients of scale and shift are sums over positions.

Where channels have planes, torch's own backward pass finds those sums: to it, a batch is one example with the channels
of all. Channels last, both passes are ``kernels`` of our own, where there are; else the backward pass is written out
here, since it needs the sums anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.step.gradients import compiled
from fed_dpsat.step.gradients.contribution import Rows, wide
from fed_dpsat.step.gradients.formats import alike, dense, is_channels_last
from fed_dpsat.step.gradients.linear import Roles
from fed_dpsat.step.placement import bytes_at_once

FEW_BYTES, LEAST_RUN = 1_000_000, 64


@dataclass(frozen=True, kw_only=True)
class GroupNorm:
    """``x[B, C, *]``, statistics over ``groups`` of channels; InstanceNorm is one group per channel."""

    groups: int
    eps: float
    kernels: bool = False

    @property
    def strategy(self) -> str:
        """``compiled``, for images with their channels last, or ``rows``."""
        return "compiled" if self.kernels else "rows"

    def _compiled(self, x: Tensor, weight: Tensor | None) -> bool:
        types = {x.dtype} if weight is None else {x.dtype, weight.dtype}
        return self.kernels and is_channels_last(x) and types == {torch.float32} and x.device.type == "cpu"

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what the backward pass needs."""
        x = dense(x)
        if self._compiled(x, weight):
            out, mean, rstd = compiled.norm_forward(x, weight, bias, self.groups, self.eps)
            return out, (x, mean, rstd)
        size = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        out, mean, rstd = torch.native_group_norm(x, weight, bias, *size, self.groups, self.eps)
        return out, (x, mean, rstd)

    def backward(
        self, grad: Tensor, weight: Tensor | None, saved: tuple[Tensor, ...], need_input: bool, roles: tuple[str, ...]
    ) -> tuple[Tensor | None, Roles]:
        """Gradient of the input, and the contributions to the parameters in ``roles``."""
        x, mean, rstd = saved
        grad = alike(grad, x)
        if self._compiled(x, weight):
            gradient, *sums = compiled.norm_backward(x, grad, weight, mean, rstd, self.groups, need_input)
            both = dict(zip(("weight", "bias"), sums, strict=True))
            return gradient, {role: Rows(data=both[role]) for role in roles}
        if weight is None or not roles:  # a shift alone has no gradient that needs the input
            size = x.shape[0], x.shape[1], math.prod(x.shape[2:]), self.groups
            wanted = [need_input, False, False]
            found = torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, weight, *size, wanted)
            return found[0] if need_input else None, {role: Rows(data=_sums(wide(grad))) for role in roles}
        by_format = self._last if is_channels_last(x) else self._planes
        gradient, rows = by_format(grad, weight, saved, need_input)
        return gradient, {role: Rows(data=wide(rows[role])) for role in roles}

    def _planes(
        self, grad: Tensor, weight: Tensor, saved: tuple[Tensor, ...], need_input: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        x, mean, rstd = saved
        batch, channels = x.shape[:2]
        one = 1, batch * channels
        found = torch.ops.aten.native_group_norm_backward(
            grad.view(*one, -1),
            x.view(*one, -1),
            mean.view(1, -1),
            rstd.view(1, -1),
            weight.repeat(batch),
            *one,
            math.prod(x.shape[2:]),
            batch * self.groups,
            [need_input, True, True],
        )
        scale, shift = (rows.view(batch, channels) for rows in found[1:])
        return found[0].view_as(x) if need_input else None, {"weight": scale, "bias": shift}

    def _last(
        self, grad: Tensor, weight: Tensor, saved: tuple[Tensor, ...], need_input: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The input's gradient is a x + b grad + c, coefficients from the sums of ``grad`` and ``grad * x``."""
        x, mean, rstd = saved
        batch, channels = x.shape[:2]
        tile = next(n for n in range(max(1, LEAST_RUN // channels), 0, -1) if x[0, 0].numel() % n == 0)
        runs = batch, x[0, 0].numel() // tile, tile * channels
        inputs, outputs = (wide(t).movedim(1, -1).reshape(runs) for t in (x, grad))
        found = torch.empty_like(inputs)
        means, rstds = mean.view(batch, self.groups, 1), rstd.view(batch, self.groups, 1)
        weights, size = weight.view(1, self.groups, -1), x[0].numel() // self.groups
        sums = inputs.new_empty(2, batch, channels)
        few = max(1, bytes_at_once(x.device, FEW_BYTES) // (x[0].numel() * x.element_size()))
        for i in range(0, batch, few):
            some, slopes, out = inputs[i : i + few], outputs[i : i + few], found[i : i + few]
            torch.mul(some, slopes, out=out)
            for total, each in zip(sums, (out, slopes), strict=True):
                total[i : i + few] = each.sum(1).view(-1, tile, channels).sum(1)
            if not need_input:
                continue
            s, b = ((t[i : i + few].view(-1, *weights.shape[1:]) * weights).sum(2, keepdim=True) for t in sums)
            m, r = means[i : i + few], rstds[i : i + few]
            a = (b * m - s) * r**3 / size
            c = -a * m - b * r / size
            a, c = (t.expand(-1, -1, weights.shape[2]).reshape(-1, 1, channels).repeat(1, 1, tile) for t in (a, c))
            slope = (r * weights).reshape(-1, 1, channels).repeat(1, 1, tile)
            torch.addcmul(c, some, a, out=out).addcmul_(slopes, slope)
        raw, shift = (t.view(batch, self.groups, -1) for t in sums)
        rows = {"weight": ((raw - shift * means) * rstds).view(batch, channels), "bias": sums[1]}
        gradient = found.view(batch, *x.shape[2:], channels).movedim(-1, 1).to(x.dtype) if need_input else None
        return gradient, rows


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """``x[B, *, *shape]``, statistics over the last dimensions ``shape``."""

    shape: tuple[int, ...]
    eps: float

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what the backward pass needs."""
        out, mean, rstd = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return out, (x, mean, rstd)

    def backward(
        self, grad: Tensor, weight: Tensor | None, saved: tuple[Tensor, ...], need_input: bool, roles: tuple[str, ...]
    ) -> tuple[Tensor | None, Roles]:
        """Gradient of the input, and the contributions to the parameters in ``roles``."""
        x, mean, rstd = saved
        found: Roles = {}
        rows = x.shape[0], -1, *self.shape
        if "weight" in roles:
            found["weight"] = Rows(data=(wide(grad) * ((x - mean) * rstd)).reshape(rows).sum(1))
        if "bias" in roles:
            found["bias"] = Rows(data=wide(grad).reshape(rows).sum(1))
        if not need_input:
            return None, found
        backward = torch.ops.aten.native_layer_norm_backward
        return backward(grad, x, self.shape, mean, rstd, weight, None, [True, False, False])[0], found


def _sums(grad: Tensor) -> Tensor:
    return grad if grad.ndim == 2 else grad.flatten(2).sum(2)
