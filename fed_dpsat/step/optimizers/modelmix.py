"""ModelMix (Xiao, Wan, Devadas 2022, arXiv 2210.03843): step from a random mixture of the last two iterates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.optimizers.base import Over, State, StepInfo
from fed_dpsat.step.optimizers.dpsgd import scheduled

PREVIOUS = "previous"


@dataclass(frozen=True, kw_only=True)
class ModelMix(Over):
    """ModelMix: step from ``alpha * w + (1 - alpha) * w_prev``, alpha ~ U[0, 1] per coordinate (Xiao et al. 2022).

    The gradient is taken at ``w``. Where ``|w - w_prev| < tau`` both are first moved apart about their middle, to a gap
    of ``tau = lr * gap_rate``, as in their code; ``gap_rate`` is in units of a coordinate of the gradient, and 0.01 is
    ours: their script for CIFAR-10 has 0.1. ``base`` makes the step. A step costs the event of DP-SGD: the
    amplification that the paper proves for the mixing rests on assumptions that a run does not check, and is not
    claimed.

    ====================== =====================================================================
    case                   result
    ====================== =====================================================================
    the first step         there is no w_prev: ``base``
    w = w_prev, tau = 0    ``base``, bit for bit
    w = w_prev, tau > 0    w moves by up to tau / 2 either way; in their code it stays
    a new round            w is the global model, w_prev this client's own before its last step
    ====================== =====================================================================
    """

    lr: float
    gap_rate: float = 0.01
    lr_schedule: str = "constant"
    total_steps: int = 0
    carries: ClassVar[tuple[str, ...]] = (PREVIOUS,)

    def __post_init__(self) -> None:
        if not 0 <= self.gap_rate < math.inf:
            raise SettingError("gap_rate", self.gap_rate, "in [0, inf)", "0 mixes without moving iterates apart")

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base`` from the mixture; draws one number per coordinate from torch's CPU generator."""
        start, previous = params, state.get(PREVIOUS)
        if previous is not None:
            tau = self.gap_rate * scheduled(self.lr, self.lr_schedule, info.index, self.total_steps)
            start = {name: _mixed(w, previous[name], tau) for name, w in params.items()}
        moved, after = super().update(start, private_gradient, state, info)
        return moved, {**after, PREVIOUS: params}


def _mixed(w: Tensor, previous: Tensor, tau: float) -> Tensor:
    """A point between the two, coordinate by coordinate, after those that are close were moved apart."""
    alpha = torch.rand_like(w, device="cpu").to(w.device)
    mixed = torch.lerp(previous, w, alpha)
    if tau == 0:
        return mixed
    gap = w - previous
    apart = torch.lerp(previous, w, 0.5) + (alpha - 0.5) * torch.where(gap >= 0, 1, -1).to(w) * tau
    return torch.where(gap.abs() < tau, apart, mixed)


OPTIMIZERS = {"modelmix": ModelMix}
