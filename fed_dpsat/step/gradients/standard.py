"""Standardised filters (WSConv2d): per-example norms of the raw weight without its per-example gradients.

With c = v - mean(v), u = c / |c| and w = gain u, filter by filter, a gradient V of w is one of

    dv    = (gain / |c|) (V - mean(V) - u <u, V>)        and        dgain = <u, V>,

so |dv|^2 = (gain / |c|)^2 (|V|^2 - sum(V)^2 / N - <u, V>^2). Where |c|^2 is at its floor u is linear in v, and the
last term is absent. The weighted sum goes through the Jacobian once: it is linear, and the same for all examples.

That the Jacobian of a weight is this one is seen by what it makes of a random V, at every step and before any norm is
told: equal values are no proof of it, and in the sum over a batch what is wrong may cancel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.step.gradients.contribution import Contribution, Parts, Rows
from fed_dpsat.step.gradients.finite import filter_squares
from fed_dpsat.step.gradients.product import CANCELLATION, Product, gram

FLOOR = 1e-4
"""Least squared norm of a centred filter, as in ``WSConv2d``."""

JACOBIAN = 4e-6
"""How far, relative to its norm, a random vector may come out of the Jacobian from where the formula has it."""

LEAST_GAIN = 1e-6
"""Below it, outputs over gain might not be what a layer makes of ``u``."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """``u[O, ...]``, ``scale[O]`` = gain / |c| and ``free[O]``, 0 where |c|^2 is at its floor, else 1."""

    u: Tensor
    scale: Tensor
    free: Tensor


def filters(weight: Tensor, gain: Tensor) -> Filters:
    """What standardisation makes of ``weight[O, ...]`` and ``gain[O]``."""
    centred = weight - weight.flatten(1).mean(1).view(-1, *[1] * (weight.ndim - 1))
    squared = centred.flatten(1).square().sum(1)
    inverse = squared.clamp(min=FLOOR).rsqrt()
    u = centred * inverse.view(-1, *[1] * (weight.ndim - 1))
    return Filters(u=u, scale=gain * inverse, free=(squared > FLOOR).to(weight))


def contributions(
    w: Tensor, held: Contribution, weight: Tensor, gain_leaf: Tensor
) -> tuple[Contribution, Contribution] | None:
    """To ``weight`` and ``gain``, from those to ``w``; None where ``w`` has other values, or another Jacobian, than
    ``weight`` standardised, or where a norm would be a difference of large numbers.
    """
    if weight.shape != w.shape or gain_leaf.shape != w.shape[:1]:
        return None
    gain = gain_leaf.detach()
    f = filters(weight.detach(), gain)
    again = f.u * _wide(gain, w)
    if not bool(((again - w.detach()).abs() <= 1e-6 + 1e-5 * again.abs()).all()) or not _varies(
        w, weight, gain_leaf, f
    ):
        return None
    if isinstance(held, Rows | Parts):
        squares, sums, along = _of_rows(held, gain, f)
        total = squares @ f.scale.double().square()
    elif isinstance(held, Product) and held.exact is None and held.inputs_gram is not None:
        sums, along = _of_product(held, gain, f)
        scaled = held.outputs * _wide(f.scale, held.outputs[0])
        total = (held.inputs_gram * gram(scaled.flatten(2).transpose(1, 2))).sum((1, 2), dtype=torch.float64)
    else:
        return None
    away = sums.double().square() / weight[0].numel() + f.free.double() * along.double().square()
    norms = total - away @ f.scale.double().square()
    if bool((total > CANCELLATION * (norms + along.double().square().sum(1))).any()):
        return None
    norms = norms + torch.finfo(weight.dtype).eps * total  # what rounding may have taken
    return Standard(w=w, held=held, weight=weight, norms=norms), Rows(data=along)


def _varies(w: Tensor, weight: Tensor, gain: Tensor, f: Filters) -> bool:
    """Whether a random vector goes through the Jacobian of ``w`` as the formula has it, filter by filter."""
    vector = _drawn(w.numel(), w.dtype, w.device).view_as(w)
    found = torch.autograd.grad(w, (weight, gain), vector, retain_graph=True, allow_unused=True)
    if found[0] is None or found[1] is None:
        return False
    flat, u = vector.flatten(1), f.u.flatten(1)
    along = (flat * u).sum(1)
    expected = flat - flat.mean(1, keepdim=True) - u * (f.free * along)[:, None]
    size = JACOBIAN * torch.linalg.vector_norm(flat, dim=1)
    away = torch.linalg.vector_norm(torch.addcmul(-found[0].flatten(1), expected, f.scale[:, None]), dim=1)
    return bool(((away <= f.scale.abs() * size) & ((found[1] - along).abs() <= size)).all())


@functools.lru_cache(maxsize=64)
def _drawn(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, generator=generator).to(device, dtype)


@dataclass(frozen=True, kw_only=True)
class Standard:
    """Contribution to a raw weight from ``held``, that to the standardised one."""

    w: Tensor
    held: Contribution
    weight: Tensor
    norms: Tensor

    def squared_norms(self) -> Tensor:
        """``[B]``."""
        return self.norms

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """Through the Jacobian, by autograd."""
        total = self.held.weighted_sum(factors, finite)
        found: Tensor = torch.autograd.grad(self.w, self.weight, total, retain_graph=True)[0]
        return found

    def rows(self) -> Tensor:
        """``[B, *shape]``."""
        rows = self.held.rows()
        found: Tensor = torch.autograd.grad(self.w, self.weight, rows, is_grads_batched=True, retain_graph=True)[0]
        return found


def _of_rows(held: Rows | Parts, gain: Tensor, f: Filters) -> tuple[Tensor, Tensor, Tensor]:
    """Per filter ``[B, O]``: squared norms, sums, products with ``u``."""
    found = [_of_part(part, gain, f) for part in (held.parts if isinstance(held, Parts) else [held])]
    squares, sums, along = (torch.cat(each) for each in zip(*found, strict=True))
    return squares, sums, along


def _of_part(held: Rows, gain: Tensor, f: Filters) -> tuple[Tensor, Tensor, Tensor]:
    if held.filters is not None and bool((gain.abs() > LEAST_GAIN).all()):
        squares, sums, along = held.filters
        return squares, sums, along / gain
    data, u = held.rows().flatten(2), f.u.flatten(1)
    return filter_squares(data), data.sum(2), (data * u).sum(2)


def _of_product(held: Product, gain: Tensor, f: Filters) -> tuple[Tensor, Tensor]:
    """Sums and products with ``u``, ``[B, O]``: what the layer makes of filters of ones, and of ``u``."""
    assert held.apply is not None
    assert held.made is not None
    if bool((gain.abs() > LEAST_GAIN).all()):
        along = (held.made * held.outputs).flatten(2).sum(2) / gain
    else:
        along = (held.apply(held.inputs, f.u) * held.outputs).flatten(2).sum(2)
    patch_sums = held.apply(held.inputs.sum(1, keepdim=True), torch.ones_like(f.u[:1, :1])).flatten(1)
    return torch.bmm(held.outputs.flatten(2), patch_sums[..., None])[..., 0], along


def _wide(filters: Tensor, like: Tensor) -> Tensor:
    """``[O] -> [O, 1, ...]``, to be multiplied with ``like[O, ...]``."""
    return filters.view(-1, *[1] * (like.ndim - 1))
