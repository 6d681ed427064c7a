"""DP-SGD (Abadi et al. 2016): stochastic gradient descent on the private gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, zeros_like
from fed_dpsat.step.optimizers.base import State, StepInfo

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Share of ``lr`` left when a share ``progress`` in [0, 1] of ``total_steps`` is done."""


def scheduled(lr: float, lr_schedule: str, step: int, total_steps: int) -> float:
    """The learning rate of ``step``, which counts from 0; beyond ``total_steps`` it stays where it was."""
    return lr * SCHEDULES[lr_schedule](min(step / max(total_steps, 1), 1.0))


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """DP-SGD: SGD with momentum, weight decay and an lr schedule on the private gradient (Abadi et al. 2016).

    The update is that of ``torch.optim.SGD``: g += weight_decay * w; m = momentum * m + g; w -= lr * m.

    Raises ``SettingError`` for settings out of bounds.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    total_steps: int = 0

    def __post_init__(self) -> None:
        for name, value, bound, good in (
            ("lr", self.lr, "in [0, inf)", 0 <= self.lr < math.inf),
            ("momentum", self.momentum, "in [0, 1)", 0 <= self.momentum < 1),
            ("weight_decay", self.weight_decay, "in [0, inf)", 0 <= self.weight_decay < math.inf),
        ):
            if not good:
                raise SettingError(name, value, bound, "see `fed-dpsat run --help-all`")
        if self.lr_schedule not in SCHEDULES:
            raise SettingError("lr_schedule", self.lr_schedule, f"one of {', '.join(SCHEDULES)}", "choose one")
        if self.lr_schedule != "constant" and self.total_steps < 1:
            raise SettingError("total_steps", self.total_steps, "at least 1", "the schedule needs an end")

    @property
    def carries(self) -> tuple[str, ...]:
        """The momentum."""
        return ("momentum",) if self.momentum else ()

    def init(self, params: Params) -> State:
        """No momentum yet."""
        return {"momentum": zeros_like(params)} if self.momentum else {}

    def query_point(self, params: Params, state: State, info: StepInfo) -> Params:
        """The parameters themselves."""
        return params

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """One SGD step."""
        return self._step(params, private_gradient, state, info, _new)

    def update_owned(
        self, params: Params, private_gradient: Params, state: State, info: StepInfo
    ) -> tuple[Params, State]:
        """``update`` in the memory of ``private_gradient``, which saves a third of the way that numbers go."""
        return self._step(params, private_gradient, state, info, _first)

    def _step(self, params: Params, slope: Params, state: State, info: StepInfo, out: Out) -> tuple[Params, State]:
        lr = scheduled(self.lr, self.lr_schedule, info.index, self.total_steps)
        if self.weight_decay:
            slope = _sums(slope, params, self.weight_decay, out)
        if self.momentum:
            slope = _sums(slope, state["momentum"], self.momentum, out)
            state, out = {"momentum": slope}, _new
        moved = {name: torch.add(p, slope[name], alpha=-lr, out=out(slope[name], p)) for name, p in params.items()}
        return moved, state


def _sums(slope: Params, other: Params, share: float, out: Out) -> Params:
    return {name: torch.add(g, other[name], alpha=share, out=out(g, other[name])) for name, g in slope.items()}


Out = Callable[[Tensor, Tensor], Tensor | None]
"""Where the sum of two tensors goes; None is a new one."""


def _new(first: Tensor, second: Tensor) -> Tensor | None:
    return None


def _first(first: Tensor, second: Tensor) -> Tensor | None:
    return first if first.dtype == second.dtype and first.stride() == second.stride() else None


OPTIMIZERS = {"dp-sgd": DPSGD}
