"""DPlis (Wang et al., PoPETs 2021, arXiv 2103.01496): gradients of a smoothed loss.

An example's gradient is the mean over K draws of ``grad(w + N(0, r^2 I))``, clipped once: smoothing comes before the
clip, so a step costs one event whatever K is, and K backward passes. Draws are the same for every example of a step.
Their code (github.com/wangwenxiao/DPlis) clips the sum of the K gradients in place of their mean, and has r in units of
the noise of a step.

================ ===============================
case             what happens
================ ===============================
r = 0, any K     ``base``, bit for bit
================ ===============================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.optimizers.base import Over, State, StepInfo, check_space
from fed_dpsat.step.query import At, first_point, map_points, mixture


@dataclass(frozen=True, kw_only=True)
class DPlis(Over):
    """DPlis: ``base`` on the gradient averaged over ``draws`` points within about ``radius`` of w (Wang et al. 2021).

    ``radius`` is the standard deviation of each coordinate, in parameter space. Raises ``SettingError``.
    """

    draws: int = 5
    radius: float = 0.01
    moves_like_base: ClassVar[bool] = True
    carries: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise SettingError("draws", self.draws, "at least 1", "each is one more backward pass; 5 is a start")
        if not 0 <= self.radius < math.inf:
            raise SettingError("radius", self.radius, "in [0, inf)", "0 is no smoothing; 0.01 is a start")

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """``draws`` points around where ``base`` looks, from torch's CPU generator, which the loop seeds."""
        at = super().query_point(params, state, info)
        if self.radius == 0:
            return at
        check_space("optimizer", "dplis", params, first_point(at))
        return mixture([(1 / self.draws, map_points(at, self._drawn)) for _ in range(self.draws)])

    def _drawn(self, params: Params) -> Params:
        drawn = {name: torch.randn_like(p, device="cpu").to(p.device) for name, p in params.items()}
        return {name: torch.add(p, drawn[name], alpha=self.radius) for name, p in params.items()}


OPTIMIZERS = {"dplis": DPlis}
