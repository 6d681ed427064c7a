"""Sums of clipped per-example gradients: one interface, several engines.

=========================== ============================================
case                        result
=========================== ============================================
empty batch                 zeros
an example with NaN or inf  contributes zero, and is counted
physical batches            the sum over chunks, up to rounding
a frozen parameter          not in ``params``, so not in the sum
=========================== ============================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fed_dpsat.clipping import ClippingRule
from fed_dpsat.errors import ModelError, SettingError
from fed_dpsat.params import Params, zeros_like


class LossFn(Protocol):
    """Losses ``[B]``, one per example, of a batch whose examples do not mix."""

    def __call__(self, params: Params, inputs: Tensor, targets: Tensor, /) -> Tensor:
        """``inputs[B, ...], targets[B, ...] -> losses[B]``."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """``outputs[B, K], targets[B] -> losses[B]``."""
    return functional.cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True)
class ModelLoss:
    """The per-example loss of ``module`` as a function of its parameters.

    Raises ``ModelError`` for a module whose examples mix (BatchNorm and the like), naming the layer.
    """

    module: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy

    def __post_init__(self) -> None:
        check_module(self.module)

    def __call__(self, params: Params, inputs: Tensor, targets: Tensor, /) -> Tensor:
        """``inputs[B, ...], targets[B] -> losses[B]`` at ``params``; what is not in them stays as it is."""
        return self.criterion(functional_call(self.module, params, (inputs,)), targets)


def check_module(module: nn.Module) -> None:
    """Refuse layers that share statistics between examples; Opacus' validator finds them."""
    from opacus.validators import ModuleValidator  # type: ignore[import-untyped]  # seconds: imported when needed

    was_training = module.training
    errors = ModuleValidator.validate(module.train(), strict=False)
    module.train(was_training)
    if errors:
        named = [
            f"{name} ({type(m).__name__})" for name, m in module.named_modules() if "BatchNorm" in type(m).__name__
        ]
        raise ModelError(
            f"{type(module).__name__} has layers that mix examples: {', '.join(named) or errors[0]}; "
            "use GroupNorm or LayerNorm, or convert it with opacus.validators.ModuleValidator.fix"
        )


def clipped_gradient_sum(
    loss_fn: LossFn,
    params: Params,
    batch: tuple[Tensor, Tensor],
    clipping: ClippingRule,
    *,
    engine: str = "vmap",
    physical_batch_size: int = 128,
) -> tuple[Params, int]:
    """Sum of clipped gradients, one per example of ``(inputs[B, ...], targets[B])``; a sum, not a mean.

    Also returns how many examples had a gradient that was not finite. Both are sensitive: noise comes next.
    At most ``physical_batch_size`` per-example gradients are held at a time; the split changes nothing else.
    """
    if engine not in ENGINES:
        raise SettingError("engine", engine, f"one of {', '.join(ENGINES)}", "choose one of those")
    if physical_batch_size < 1:
        raise SettingError("physical_batch_size", physical_batch_size, "at least 1", "128 suits most CPUs")
    clipped_sum, num_nonfinite = zeros_like(params), 0
    inputs, targets = batch
    for x, y in zip(torch.split(inputs, physical_batch_size), torch.split(targets, physical_batch_size), strict=True):
        if len(x):
            chunk, nonfinite = ENGINES[engine](loss_fn, params, x, y, clipping)
            num_nonfinite += nonfinite
            clipped_sum = {name: total + chunk[name] for name, total in clipped_sum.items()}
    return clipped_sum, num_nonfinite


def _vmap_engine(
    loss_fn: LossFn, params: Params, inputs: Tensor, targets: Tensor, clipping: ClippingRule
) -> tuple[Params, int]:
    """The reference: every per-example gradient in memory, any module that ``torch.func`` can map over."""

    def loss_of_one(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(p, x[None], y[None]).squeeze(0)

    gradients = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")(params, inputs, targets)
    rows = {name: g.flatten(1) for name, g in gradients.items()}
    squared_norms = {name: torch.linalg.vector_norm(g, dim=1).square() for name, g in rows.items()}
    finite = torch.stack(list(squared_norms.values())).sum(0).isfinite()
    num_nonfinite = int((~finite).sum())
    if num_nonfinite:
        rows = {name: g.where(finite[:, None], 0) for name, g in rows.items()}
        squared_norms = {name: n.where(finite, 0) for name, n in squared_norms.items()}
    factors = clipping.factors(squared_norms)
    return {name: (factors[name] @ g).view_as(params[name]) for name, g in rows.items()}, num_nonfinite


ENGINES = {"vmap": _vmap_engine}
