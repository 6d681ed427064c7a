"""Adam on the private gradient, with the noise taken out of the second moment: DP-AdamBC."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, zeros_like
from fed_dpsat.step.optimizers.base import State, StepInfo
from fed_dpsat.step.optimizers.dpsgd import DPSGD

MEAN, SQUARE, COUNT = "mean", "square", "count"


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Private Adam whose second moment has the known noise subtracted: DP-AdamBC (Tang et al. 2024).

    ``g += weight_decay * w; m, v = `` moving averages of g and g^2; then
    ``w -= lr * m_hat / (sqrt(max(v_hat - s2, floor * s2)) + eps)``, with s2 the variance of the noise in a coordinate
    of the private gradient (arXiv 2312.14334). That is (noise_multiplier * clip_norm / expected_batch_size)^2, which
    the loop tells (``StepInfo``); where clip_norm changes, s2 is averaged as g^2 is. The paper's floor gamma' is
    absolute and tuned, and it has no eps; this floor is in units of s2, so that it follows noise and batch.

    ======================== ===============================================================
    case                     result
    ======================== ===============================================================
    no noise                 ``torch.optim.Adam``
    v_hat below s2           noise alone: the floor
    floor = 1                no coordinate is scaled by less than its noise
    a client's first round   its own count of steps corrects m and v, whatever the round
    ======================== ===============================================================

    The setting ``momentum`` is not Adam's; ``beta1`` is. Raises ``SettingError`` for settings out of bounds.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    floor: float = 0.3
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    total_steps: int = 0
    carries: ClassVar[tuple[str, ...]] = (MEAN, SQUARE, COUNT)

    def __post_init__(self) -> None:
        for name, value, bound, good in (
            ("beta1", self.beta1, "in [0, 1)", 0 <= self.beta1 < 1),
            ("beta2", self.beta2, "in [0, 1)", 0 <= self.beta2 < 1),
            ("eps", self.eps, "above 0 and finite", 0 < self.eps < math.inf),
            ("floor", self.floor, "above 0 and finite", 0 < self.floor < math.inf),
            ("weight_decay", self.weight_decay, "in [0, inf)", 0 <= self.weight_decay < math.inf),
        ):
            if not good:
                raise SettingError(name, value, bound, "leave it out for its default")
        _ = self._step

    @property
    def _step(self) -> DPSGD:
        return DPSGD(lr=self.lr, lr_schedule=self.lr_schedule, total_steps=self.total_steps)

    def init(self, params: Params) -> State:
        """No moments yet."""
        count = {"steps": torch.tensor(0), "noise": torch.tensor(0.0, dtype=torch.float64)}
        return {MEAN: zeros_like(params), SQUARE: zeros_like(params), COUNT: count}

    def query_point(self, params: Params, state: State, info: StepInfo) -> Params:
        """The parameters themselves."""
        return params

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """One step of Adam."""
        slope = private_gradient
        if self.weight_decay:
            slope = {name: torch.add(g, params[name], alpha=self.weight_decay) for name, g in slope.items()}
        steps = state[COUNT]["steps"] + 1
        noise = self._averaged(state[COUNT]["noise"], info.noise_std.square())
        mean = {name: torch.lerp(state[MEAN][name], g, 1 - self.beta1) for name, g in slope.items()}
        square = {name: self._averaged(state[SQUARE][name], g.square()) for name, g in slope.items()}
        seen = [1 - beta ** steps.double() for beta in (self.beta1, self.beta2)]
        direction = {
            name: m / seen[0].to(m) / self._scale(square[name] / seen[1].to(m), noise / seen[1])
            for name, m in mean.items()
        }
        moved, _ = self._step.update(params, direction, {}, info)
        return moved, {MEAN: mean, SQUARE: square, COUNT: {"steps": steps, "noise": noise}}

    def _averaged(self, average: Tensor, new: Tensor) -> Tensor:
        return self.beta2 * average + (1 - self.beta2) * new

    def _scale(self, square: Tensor, noise: Tensor) -> Tensor:
        signal = torch.maximum(square - noise.to(square), (self.floor * noise).to(square))
        return signal.sqrt() + self.eps


OPTIMIZERS = {"adam": Adam}
