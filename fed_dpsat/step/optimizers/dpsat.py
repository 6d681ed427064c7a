"""DP-SAT (Park et al., ICML 2023, arXiv 2306.05651): climb along what is already private, then descend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, subtract
from fed_dpsat.step.optimizers.base import ASCENT, Over, State, StepInfo, check_space, climb
from fed_dpsat.step.query import At, first_point, map_points


@dataclass(frozen=True, kw_only=True)
class DPSAT(Over):
    """DP-SAT: gradient at ``w + rho * g / |g|``, g the last private one; step at ``w`` (Park et al. 2023).

    ``base`` makes the step, so any private optimizer can be made sharpness-aware. ``rho = 0`` is ``base``,
    bit for bit. Without a last gradient the query point is ``w``: in a client's first step, and with
    ``ascent_memory`` "zero" in the first of each round.
    """

    rho: float
    ascent_memory: str = "client"
    moves_like_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.rho < math.inf:
            raise SettingError("rho", self.rho, "in [0, inf)", "the authors' notebooks have 0.03")

    @property
    def carries(self) -> tuple[str, ...]:
        """The direction, unless ``ascent_memory`` is "zero"."""
        return (ASCENT,) if self.ascent_memory == "client" else ()

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """``rho`` up the remembered direction, from wherever ``base`` looks: every point of its query."""
        asked = super().query_point(params, state, info)
        if self.rho:
            check_space("rho", self.rho, params, first_point(asked))
        return map_points(asked, lambda at: climb(at, state.get(ASCENT), self.rho))

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base`` at the unperturbed ``params``; remembers ``private_gradient``."""
        moved, after = super().update(params, private_gradient, state, info)
        return moved, {**after, ASCENT: private_gradient}


@dataclass(frozen=True, kw_only=True)
class DPSATMomentum(DPSAT):
    """DP-SAT-Momentum: climbs along ``w_prev - w``, its last step backwards (official code of the same paper).

    Over DP-SGD without momentum and weight decay that is the direction of the last gradient, and this is DP-SAT.
    """

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base``; remembers ``params`` minus where it went."""
        moved, after = super().update(params, private_gradient, state, info)
        return moved, {**after, ASCENT: subtract(params, moved)}


OPTIMIZERS = {"dp-sat": DPSAT, "dp-sat-momentum": DPSATMomentum}
