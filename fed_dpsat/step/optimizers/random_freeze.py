"""Random freeze (Zhu & Blaschko, arXiv 2112.00845): a public mask, drawn anew for each round.

Frozen coordinates are dropped before clipping and get no noise: clip norm and noise act on the active ones alone, so a
step costs one event. The share that is frozen grows linearly to ``freeze_rate`` over the first ``freeze_ramp`` of the
rounds (gradual cooling; a round stands for an epoch, and the authors' code takes all of them). The mask follows from
seed and round, so a server knows it, and only active coordinates are sent (``fed_dpsat.step.subspace``).

=================== =========================================================
case                what happens
=================== =========================================================
freeze_rate = 0     ``base``, bit for bit
the first round     nothing is frozen yet, unless ``freeze_ramp`` is 0
momentum and decay  of a frozen coordinate: it does not move, to the bit
=================== =========================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, cut
from fed_dpsat.step.optimizers.base import Over, State, StepInfo, check_space
from fed_dpsat.step.query import At, as_query, first_point
from fed_dpsat.step.subspace import Coordinates


@dataclass(frozen=True, kw_only=True)
class RandomFreeze(Over):
    """Random freeze: ``base`` on a random share of the coordinates, another one each round (Zhu & Blaschko 2021).

    ``freeze_rate`` is the share frozen in the end, ``freeze_ramp`` the share of rounds until then. Raises
    ``SettingError``.
    """

    seed: int
    steps_per_round: int
    total_steps: int
    freeze_rate: float = 0.7
    freeze_ramp: float = 0.5
    carries: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, value, bound, good in (
            ("freeze_rate", self.freeze_rate, "in [0, 1)", 0 <= self.freeze_rate < 1),
            ("freeze_ramp", self.freeze_ramp, "in [0, 1]", 0 <= self.freeze_ramp <= 1),
            ("steps_per_round", self.steps_per_round, "at least 1", self.steps_per_round >= 1),
            ("total_steps", self.total_steps, "at least 1", self.total_steps >= 1),
        ):
            if not good:
                raise SettingError(name, value, bound, "0.7 of the coordinates frozen after half the rounds is a start")

    def rate(self, round: int) -> float:
        """The share frozen in ``round``, from 1."""
        ramp = self.freeze_ramp * self.total_steps / self.steps_per_round
        return self.freeze_rate * (1.0 if ramp == 0 else min(1.0, (round - 1) / ramp))

    def subspace(self, round: int, d: int) -> Coordinates | None:
        """The coordinates that can change in ``round``, of ``d``; None for all."""
        frozen = math.floor(self.rate(round) * d + 1e-9)  # 0.7 * 650 is 454.99...
        return Coordinates(seed=self.seed, round=round, frozen=frozen) if frozen else None

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """What ``base`` asks, on active coordinates."""
        at, active = super().query_point(params, state, info), self._active(params, info)
        if self.freeze_rate:
            check_space("optimizer", "random-freeze", params, first_point(at))
        if active is None:
            return at
        query = as_query(at)
        inner = query.active or {}
        both = {name: mask & inner[name] if name in inner else mask for name, mask in active.items()}
        return replace(query, active=both)

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base``, of active coordinates alone."""
        active = self._active(params, info)
        if active is None:
            return super().update(params, private_gradient, state, info)
        slope = {name: g.where(active[name], 0) for name, g in private_gradient.items()}
        moved, after = super().update(params, slope, state, info)
        return {name: torch.where(active[name], p, params[name]) for name, p in moved.items()}, after

    def _active(self, params: Params, info: StepInfo) -> Params | None:
        d = sum(p.numel() for p in params.values())
        coordinates = self.subspace(info.round, d)
        if coordinates is None:
            return None
        return {name: mask.to(params[name].device) for name, mask in cut(coordinates.active(d), params).items()}


OPTIMIZERS = {"random-freeze": RandomFreeze}
