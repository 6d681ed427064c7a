"""Averages of models that noise has made private already: post-processing, so they cost nothing.

======== ==========================================================================================================
ema      ``mean <- mu_t mean + (1 - mu_t) model``, ``mu_t = min(decay, (1 + t) / (10 + t))`` for the model after t
         others, from the model at the start (De et al., arXiv:2204.13650)
last-k   the mean of the last k models, without the one at the start; of all while there are fewer
======== ==========================================================================================================

Each mean is built by steps ``mean + share * (model - mean)``: a coordinate that no model moves keeps its bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fed_dpsat.params import Params
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, StepInfo
from fed_dpsat.step.query import At

AVERAGE = "fed_dpsat.average"
"""Where a state has the average between the steps of a round: a name that no optimizer takes for its own."""


def share_of_ema(t: int, decay: float) -> float:
    """``1 - mu_t``: the share of the model after ``t`` others."""
    return 1 - min(decay, (1 + t) / (10 + t))


def towards(mean: Params, model: Params, share: float) -> Params:
    """``mean + share * (model - mean)``."""
    return {name: torch.lerp(p, model[name], share) for name, p in mean.items()}


def mean_of(models: Iterable[Params]) -> Params:
    """The mean of one or more models, in their order."""
    first, *others = models
    for n, model in enumerate(others, 2):
        first = towards(first, model, 1 / n)
    return first


@dataclass(kw_only=True)
class ModelAverage:
    """The average of the global models of a run; ``state`` goes into its checkpoint.

    After a round that trains more layers, those have in earlier models the frozen values that the run began with.
    """

    kind: str
    decay: float
    models: int
    state: dict[str, Any] = field(default_factory=dict)

    def add(self, round: int, model: Params, frozen: Params) -> None:
        """Take the model after ``round``, 0 for the one at the start; ``frozen`` has values of layers that join."""
        if self.kind == "last-k":
            earlier = [] if round <= 1 else self.state["models"]
            kept = [{**frozen, **one} for one in earlier][-(self.models - 1) :] if self.models > 1 else []
            self.state = {"models": [*kept, model]}
        elif not round:
            self.state = {"mean": model}
        else:
            mean = {name: self.state["mean"].get(name, frozen.get(name)) for name in model}
            self.state = {"mean": towards(mean, model, share_of_ema(round - 1, self.decay))}

    @property
    def value(self) -> Params:
        """The average so far."""
        return value_of(self.state)


def value_of(state: Mapping[str, Any]) -> Params:
    """The average that a ``ModelAverage`` with that state has."""
    mean: Params = state["mean"] if "mean" in state else mean_of(state["models"])
    return mean


@dataclass(frozen=True, kw_only=True)
class LocalAverage:
    """``base``, whose last step of a round ends in the average of the ``steps`` local models of the round.

    An optimizer sees no example, so the average is one more function of private gradients, and the event of the round
    is that of its steps. The average is taken of what ``base`` makes and does not move it: only what is sent differs.
    The state between rounds is that of ``base``.
    """

    base: PrivateOptimizer
    kind: str
    decay: float
    models: int
    first_step: int
    steps: int

    def init(self, params: Params) -> State:
        """As ``base``."""
        return self.base.init(params)

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """As ``base``."""
        return self.base.query_point(params, _without(state), info)

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base``; after the last one, the average."""
        moved, after = self.base.update(params, private_gradient, _without(state), info)
        step = info.index - self.first_step
        mean, skipped = state.get(AVERAGE), max(0, self.steps - self.models) if self.kind == "last-k" else 0
        if self.kind == "ema":
            mean = towards(params if mean is None else mean, moved, share_of_ema(step, self.decay))
        elif step >= skipped:
            mean = moved if mean is None else towards(mean, moved, 1 / (step - skipped + 1))
        if step + 1 == self.steps:
            assert mean is not None
            return mean, after
        return moved, after if mean is None else {**after, AVERAGE: mean}


def _without(state: State) -> State:
    return {name: kept for name, kept in state.items() if name != AVERAGE}
