"""Ordinary training, where nothing is bounded or noised: the loss is divided by the batch size, not its gradient.

The private mean divides a sum of all parameters. Without a bound the sum is one backward pass, and there it is free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.gradients.loss import ModelLoss
from fed_dpsat.step.gradients.plain import unbounded
from fed_dpsat.step.mechanism import GaussianMechanism, Mechanism
from fed_dpsat.step.query import At, LossFn, Query


@dataclass(frozen=True)
class Averaged:
    """``criterion`` over ``batch_size``. Equal whatever the size, so that a module is probed once for all clients."""

    criterion: Callable[[Tensor, Tensor], Tensor]
    batch_size: float = field(compare=False)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``outputs[B, ...], targets[B] -> losses[B]``."""
        return self.criterion(outputs, targets) / self.batch_size


Pair = tuple[LossFn, Mechanism]


@dataclass(frozen=True, kw_only=True)
class Ordinary:
    """``averaged``, a loss and a mechanism that make of a batch, to rounding, what ``given`` would make of it."""

    given: Pair
    averaged: Pair

    @classmethod
    def of(cls, loss_fn: LossFn, clipping: ClippingRule, mechanism: Mechanism) -> Ordinary | None:
        """None where something is bounded or noised, or for a loss or mechanism that is not this library's own."""
        if type(mechanism) is not GaussianMechanism or mechanism.noise_multiplier or not unbounded(clipping):
            return None
        if type(loss_fn) is not ModelLoss:
            return None
        averaged = Averaged(loss_fn.criterion, mechanism.expected_batch_size)
        loss = dataclasses.replace(loss_fn, criterion=averaged)
        return cls(given=(loss_fn, mechanism), averaged=(loss, dataclasses.replace(mechanism, expected_batch_size=1.0)))

    def pair(self, at: At) -> Pair:
        """For what ``at`` asks; if that is not linear in the loss, or one number of it, the mechanism divides."""
        return self.given if isinstance(at, Query) and (at.loss or at.slopes) else self.averaged
