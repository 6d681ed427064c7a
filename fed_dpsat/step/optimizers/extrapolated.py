"""Extrapolated SGD (Lin, Kong, Stich, Jaggi, ICML 2020, arXiv 2006.05720): look ahead along the last gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.optimizers.base import Over, State, StepInfo, check_space
from fed_dpsat.step.query import At, first_point, map_points

LAST = "last_gradient"


@dataclass(frozen=True, kw_only=True)
class Extrapolated(Over):
    """Extrapolated SGD: gradient at ``w - lookahead * g``, g the last private one; step at ``w`` (Lin et al. 2020).

    Down, where DP-SAT goes up, and by the length of g. ``lookahead`` is by default ``lr``, one step of SGD ahead: then
    it is the extragradient of the past: of the extrapolations they allow, that along a past gradient. ``base`` makes
    the step; ``lookahead = 0`` is ``base``, bit for bit. Without a last gradient the query point is where ``base``
    looks. Across rounds the client keeps its last private gradient, whatever ``ascent_memory`` says.
    """

    lr: float
    lookahead: float | None = None
    moves_like_base: ClassVar[bool] = True
    carries: ClassVar[tuple[str, ...]] = (LAST,)

    def __post_init__(self) -> None:
        if not 0 <= self.distance < math.inf:
            raise SettingError("lookahead", self.distance, "in [0, inf)", "leave it out to look one lr ahead")

    @property
    def distance(self) -> float:
        """How many gradients ahead."""
        return self.lr if self.lookahead is None else self.lookahead

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """Ahead of where ``base`` looks, from every point of its query."""
        at, last = super().query_point(params, state, info), state.get(LAST)
        if self.distance == 0:
            return at
        check_space("optimizer", "extrapolated", params, first_point(at))
        if last is None:
            return at
        return map_points(at, lambda w: {name: torch.add(p, last[name], alpha=-self.distance) for name, p in w.items()})

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base`` at ``params``; remembers ``private_gradient``."""
        moved, after = super().update(params, private_gradient, state, info)
        return moved, {**after, LAST: private_gradient}


OPTIMIZERS = {"extrapolated": Extrapolated}
