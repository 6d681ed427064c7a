"""Zeroth-order steps (DPZero, Zhang et al. 2024, arXiv 2310.09639, Algorithm 2; DP-ZO, Tang et al. 2024, arXiv
2401.04343): a few private numbers per step.

Along a public direction u, uniform on the sphere of radius sqrt(d), example i contributes the number
``(f_i(w + mu u) - f_i(w - mu u)) / (2 mu)``. Its numbers along all directions of a step are clipped together; their
noised mean over examples is all that is released, and the base steps along the mean of ``s_k u_k``. So a step costs one
event whatever the number of directions, two forward passes for each, and no backward pass; noise is that of a few
numbers, whatever the size of the model. Directions follow from seed and step and are the same for every client, so the
numbers of a round say the whole update (``fed_dpsat.step.subspace``).

============================== ===============================================================================
case                           what happens
============================== ===============================================================================
momentum, decay, another base  the update is no combination of this round's directions: whole models are sent
dp-sat or FedProx around it    ``SettingError``: there is no gradient of the parameters
memory                         one moved copy of the trained parameters and one direction beside a forward pass
============================== ===============================================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, cut
from fed_dpsat.step.optimizers.base import Over, State, StepInfo, subspace_of
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.step.query import At, Query, Slope, as_query, compact, spread
from fed_dpsat.step.subspace import Coordinates, Span, direction

SCALAR = "along"
"""The name of query point and private gradient; with several directions they are ``along.0``, ``along.1``, ..."""


@dataclass(frozen=True, kw_only=True)
class ZerothOrder(Over):
    """Zeroth-order: ``base`` along random directions, by clipped and noised finite differences (DPZero, DP-ZO, 2024).

    ``smoothing`` is mu, how far along a direction the loss is looked at; lr has to be about d times smaller than that
    of SGD. ``directions`` is their number in a step: the clip norm bounds all numbers of an example together. Raises
    ``SettingError``.
    """

    seed: int
    steps_per_round: int
    smoothing: float = 1e-3
    directions: int = 1
    carries: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.smoothing < math.inf:
            raise SettingError("smoothing", self.smoothing, "in (0, inf)", "0.001 is a start; in float32 not far below")
        if type(self.directions) is not int or self.directions < 1:
            raise SettingError("directions", self.directions, "a whole number, at least 1", "each costs 2 passes")
        if self.steps_per_round < 1:
            raise SettingError(
                "steps_per_round", self.steps_per_round, "at least 1", "it is the local steps of a round"
            )

    def subspace(self, round: int, d: int) -> Coordinates | Span | None:
        """The directions of ``round``, from 1, if the base adds nothing to them."""
        base, first = self.base, (round - 1) * self.steps_per_round
        if type(base) is DPSGD and not base.momentum and not base.weight_decay:
            return Span(seed=self.seed, first=first, steps=self.steps_per_round, directions=self.directions)
        return subspace_of(base, round, d)

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """A number 0 for each direction, in which the slope is the finite difference around where ``base`` looks."""
        query = as_query(super().query_point(params, state, info))
        zero = next(iter(params.values())).new_zeros(())
        slopes = {
            name: Slope(points=functools.partial(self._sides, query, params, info, k), width=2 * self.smoothing)
            for k, name in enumerate(self._names)
        }
        return Query(points=((1.0, dict.fromkeys(slopes, zero)),), loss=query.loss, slopes=slopes)

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base`` along the mean of the directions, each as far as its private number says."""
        slope: Params = {}
        for k, name in enumerate(self._names):
            s = private_gradient[name] / self.directions
            for part, u in self._direction(params, info, k).items():
                along = (u * s).to(params[part])
                slope[part] = slope[part].add_(along) if k else along
        return super().update(params, slope, state, info)

    @property
    def _names(self) -> list[str]:
        return [f"{SCALAR}.{k}" for k in range(self.directions)] if self.directions > 1 else [SCALAR]

    def _sides(self, query: Query, params: Params, info: StepInfo, k: int) -> Iterator[tuple[float, Params]]:
        u = spread(query, compact(query, self._direction(params, info, k)))
        for weight, point in query.points:
            for sign in (1, -1):
                alpha = sign * self.smoothing
                yield sign * weight, {name: torch.add(p, u[name], alpha=alpha) for name, p in point.items()}

    def _direction(self, params: Params, info: StepInfo, k: int = 0) -> Params:
        d = sum(p.numel() for p in params.values())
        flat = direction(self.seed, info.index * self.directions + k, d)
        return {name: u.to(params[name]) for name, u in cut(flat, params).items()}


OPTIMIZERS = {"zeroth-order": ZerothOrder}
