"""Normalisation layers: per-example gradients of scale and shift are sums over positions.

Where channels have planes, torch's own backward pass finds those sums: to it, a batch is one example with the channels
of all. Channels last takes another pass over the layer's input and gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.engines.contribution import Rows
from fed_dpsat.engines.formats import alike, dense, is_channels_last
from fed_dpsat.engines.linear import Roles

FEW_BYTES = 500_000


@dataclass(frozen=True, kw_only=True)
class GroupNorm:
    """``x[B, C, *]``, statistics over ``groups`` of channels; InstanceNorm is one group per channel."""

    groups: int
    eps: float

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what the backward pass needs."""
        x = dense(x)
        size = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        out, mean, rstd = torch.native_group_norm(x, weight, bias, *size, self.groups, self.eps)
        return out, (x, mean, rstd)

    def backward(
        self, grad: Tensor, weight: Tensor | None, saved: tuple[Tensor, ...], need_input: bool, roles: tuple[str, ...]
    ) -> tuple[Tensor | None, Roles]:
        """Gradient of the input, and the contributions to the parameters in ``roles``."""
        x, mean, rstd = saved
        grad = alike(grad, x)
        batch, channels, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        if roles and not is_channels_last(x) and weight is not None:
            return self._one_pass(grad, weight, saved, need_input, roles)
        found: Roles = {}
        shift = _sums(grad) if roles else grad
        if "weight" in roles:
            raw = _sums_of_products(grad, x)
            wide = batch, self.groups, channels // self.groups
            scale = (raw.view(wide) - shift.view(wide) * mean.view(batch, -1, 1)) * rstd.view(batch, -1, 1)
            found["weight"] = Rows(data=scale.view(batch, channels))
        if "bias" in roles:
            found["bias"] = Rows(data=shift)
        if not need_input:
            return None, found
        size = batch, channels, positions, self.groups
        backward = torch.ops.aten.native_group_norm_backward
        return backward(grad, x, mean, rstd, weight, *size, [True, False, False])[0], found

    def _one_pass(
        self, grad: Tensor, weight: Tensor, saved: tuple[Tensor, ...], need_input: bool, roles: tuple[str, ...]
    ) -> tuple[Tensor | None, Roles]:
        x, mean, rstd = saved
        batch, channels = x.shape[:2]
        size = 1, batch * channels, math.prod(x.shape[2:]), batch * self.groups
        wanted = [need_input, "weight" in roles, "bias" in roles]
        found = torch.ops.aten.native_group_norm_backward(
            grad.view(1, batch * channels, -1),
            x.view(1, batch * channels, -1),
            mean.view(1, -1),
            rstd.view(1, -1),
            weight.repeat(batch),
            *size,
            wanted,
        )
        rows = zip(("weight", "bias"), found[1:], strict=True)
        return (
            found[0].view_as(x) if need_input else None,
            {role: Rows(data=row.view(batch, channels)) for role, row in rows if role in roles},
        )


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
        wide = x.shape[0], -1, *self.shape
        if "weight" in roles:
            found["weight"] = Rows(data=(grad * ((x - mean) * rstd)).reshape(wide).sum(1))
        if "bias" in roles:
            found["bias"] = Rows(data=grad.reshape(wide).sum(1))
        if not need_input:
            return None, found
        backward = torch.ops.aten.native_layer_norm_backward
        return backward(grad, x, self.shape, mean, rstd, weight, None, [True, False, False])[0], found


def _sums(grad: Tensor) -> Tensor:
    return grad if grad.ndim == 2 else grad.flatten(2).sum(2)


def _sums_of_products(grad: Tensor, x: Tensor) -> Tensor:
    """Sums over positions ``[B, C]``, few examples at a time: the products stay in the cache."""
    few = max(1, FEW_BYTES // max(1, grad[0].numel() * grad.element_size()))
    return torch.cat([_sums(grad[i : i + few] * x[i : i + few]) for i in range(0, len(x), few)])
