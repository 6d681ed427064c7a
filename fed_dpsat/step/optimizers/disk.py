"""DiSK (Zhang et al. 2024, arXiv 2410.03883): a simplified Kalman filter on private gradients.

With ``d = w - w_prev``, the last change of w, an example's gradient is ``(1 - c) grad(w) + c grad(w + gamma d)`` with
``c = (1 - kappa) / (gamma kappa)``, clipped once: what grad(w) is, and how it changed along d. Then ``m = (1 - kappa) m
+ kappa g``, and the base steps along m. All of it is made of private gradients or example by example, so a step costs
one event. It is two backward passes, or one where ``gamma = (1 - kappa) / kappa``, which makes c 1.

===================== ===================================================================
case                  what happens
===================== ===================================================================
kappa = 1             ``base``, bit for bit
first step            there is no d: the gradient at w, and m = kappa g
first step of a round d is how far the federation moved since the last step of the client
===================== ===================================================================

A client keeps two tensors the size of the model: m and w_prev.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, subtract, zeros_like
from fed_dpsat.step.optimizers.base import Over, State, StepInfo, check_space
from fed_dpsat.step.query import At, map_points, mixture

PREVIOUS, FILTERED, VARIANCE = "previous", "filtered", "variance"


@dataclass(frozen=True, kw_only=True)
class DiSK(Over):
    """DiSK: ``base`` on private gradients through a Kalman filter of gain ``kappa``, looking ``gamma`` ahead (2024).

    ``gamma = 0`` stands for the one that needs a single backward pass, (1 - kappa) / kappa. Raises ``SettingError``.
    """

    kappa: float = 0.7
    gamma: float = 0.0
    moves_like_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.kappa <= 1:
            raise SettingError("kappa", self.kappa, "in (0, 1]", "the authors' code has 0.7; 1 is no filter")
        if not 0 <= self.gamma < math.inf:
            raise SettingError("gamma", self.gamma, "in [0, inf)", "0 takes (1 - kappa) / kappa, one backward pass")

    @property
    def carries(self) -> tuple[str, ...]:
        """All that it keeps, unless it is no filter."""
        return () if self.kappa == 1 else (PREVIOUS, FILTERED, VARIANCE)

    def init(self, params: Params) -> State:
        """The state of ``base``, and m = 0 without noise; no last change yet."""
        state = super().init(params)
        if self.kappa == 1:
            return state
        return {**state, FILTERED: zeros_like(params), VARIANCE: torch.tensor(0.0, dtype=torch.float64)}

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """``w`` and ``w + gamma d``, weighted by 1 - c and c, each from where ``base`` looks."""
        at = super().query_point(params, state, info)
        if self.kappa == 1 or PREVIOUS not in state:
            return at
        step = subtract(params, state[PREVIOUS])
        gamma = self.gamma or (1 - self.kappa) / self.kappa
        ahead = map_points(at, lambda w: {name: torch.add(p, step[name], alpha=gamma) for name, p in w.items()})
        share = (1 - self.kappa) / (self.gamma * self.kappa) if self.gamma else 1.0
        return mixture([(1 - share, at), (share, ahead)])

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base`` along m, whose noise it is told; remembers m, and ``params`` as w_prev."""
        if self.kappa == 1:
            return super().update(params, private_gradient, state, info)
        check_space("optimizer", "disk", params, private_gradient)
        filtered = {name: torch.lerp(state[FILTERED][name], g, self.kappa) for name, g in private_gradient.items()}
        # variances of independent draws add
        variance = (1 - self.kappa) ** 2 * state[VARIANCE] + self.kappa**2 * info.noise_std.square()
        told = dataclasses.replace(info, noise_std=variance.sqrt())
        moved, after = super().update(params, filtered, state, told)
        return moved, {**after, VARIANCE: variance, FILTERED: filtered, PREVIOUS: params}


OPTIMIZERS = {"disk": DiSK}
