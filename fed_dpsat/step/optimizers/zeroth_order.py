"""Zeroth-order steps (DPZero, Zhang et al., ICML 2024, arXiv 2310.09639, Algorithm 2): one private scalar per step.

Along a public direction u, uniform on the sphere of radius sqrt(d), example i contributes the number
``(f_i(w + mu u) - f_i(w - mu u)) / (2 mu)``, clipped to C; the noised mean s of these numbers is all that is released,
and the base steps along ``s u``. A step costs one event, two forward passes and no backward pass; noise of one scalar,
whatever the size of the model. Directions follow from seed and step and are the same for every client, so the numbers
of a round say the whole update (``fed_dpsat.step.subspace``).

============================== ===============================================================================
case                           what happens
============================== ===============================================================================
momentum, decay, another base  the update is no combination of this round's directions: whole models are sent
dp-sat or FedProx around it    ``SettingError``: there is no gradient of the parameters
============================== ===============================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, cut
from fed_dpsat.step.optimizers.base import Over, State, StepInfo, subspace_of
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.step.query import At, LossFn, Query, as_query, compact, spread
from fed_dpsat.step.subspace import Coordinates, Span, direction

SCALAR = "along"
"""The one name of query point and private gradient."""


@dataclass(frozen=True, kw_only=True)
class ZerothOrder(Over):
    """Zeroth-order: ``base`` along one random direction, by a clipped and noised finite difference (DPZero, 2024).

    ``smoothing`` is mu, how far along the direction the loss is looked at; lr has to be about d times smaller than that
    of SGD. Raises ``SettingError``.
    """

    seed: int
    steps_per_round: int
    smoothing: float = 1e-3
    carries: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.smoothing < math.inf:
            raise SettingError("smoothing", self.smoothing, "in (0, inf)", "0.001 is a start; in float32 not far below")
        if self.steps_per_round < 1:
            raise SettingError(
                "steps_per_round", self.steps_per_round, "at least 1", "it is the local steps of a round"
            )

    def subspace(self, round: int, d: int) -> Coordinates | Span | None:
        """The directions of ``round``, from 1, if the base adds nothing to them."""
        base, first = self.base, (round - 1) * self.steps_per_round
        if type(base) is DPSGD and not base.momentum and not base.weight_decay:
            return Span(seed=self.seed, first=first, steps=self.steps_per_round)
        return subspace_of(base, round, d)

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """A scalar 0, of whose loss the finite difference is the gradient: on both sides of where ``base`` looks."""
        query = as_query(super().query_point(params, state, info))
        along = self._direction(params, info)
        u = spread(query, compact(query, along))
        sides = [
            (sign * weight, {name: torch.add(p, u[name], alpha=sign * self.smoothing) for name, p in point.items()})
            for weight, point in query.points
            for sign in (1, -1)
        ]
        zero = next(iter(params.values())).new_zeros(())
        return Query(points=((1.0, {SCALAR: zero}),), loss=_difference(sides, 2 * self.smoothing, query.loss))

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base`` along the direction, as far as the private scalar says."""
        s = private_gradient[SCALAR]
        slope = {name: (u * s).to(params[name]) for name, u in self._direction(params, info).items()}
        return super().update(params, slope, state, info)

    def _direction(self, params: Params, info: StepInfo) -> Params:
        d = sum(p.numel() for p in params.values())
        flat = direction(self.seed, info.index, d)
        return {name: u.to(params[name]) for name, u in cut(flat, params).items()}


def _difference(
    sides: list[tuple[float, Params]], width: float, inner: Callable[[LossFn], LossFn] | None
) -> Callable[[LossFn], LossFn]:
    """Wraps a loss: ``t`` times the weighted losses at ``sides`` over ``width``."""

    def wrap(loss_fn: LossFn) -> LossFn:
        of_point = inner(loss_fn) if inner else loss_fn

        def loss(params: Params, inputs: Tensor, targets: Tensor, /) -> Tensor:
            found = torch.stack([weight * of_point(point, inputs, targets) for weight, point in sides])
            return params[SCALAR] * found.sum(0) / width

        return loss

    return wrap


OPTIMIZERS = {"zeroth-order": ZerothOrder}
