"""SAF (Du et al., NeurIPS 2022, arXiv 2205.14083, its trajectory loss): flat minima for one more forward.

The loss of example i adds ``saf_weight * tau^2 * KL(softmax(f(w_old) / tau) || softmax(f(w) / tau))``, w_old the
weights of E epochs ago; tau^2 is in their code (github.com/AngusDujw/SAF), for which lambda 0.3 at tau 5 was chosen.
The paper stores each example's old outputs; here they are recomputed from old weights, which were made of private
gradients: so the term is a function of one example and of public state, clipping bounds it with the rest of the
gradient, and a step costs one event.

================================= =================================================================
case                              what happens
================================= =================================================================
saf_weight = 0                    ``base``, bit for bit
the first E epochs                ``base``, bit for bit: there are no old weights
a client that was away            the newest weights that are at least E epochs old
a loss that has no outputs        ``SettingError``
a task other than classification  ``SettingError`` before the run
================================= =================================================================

An epoch is 1 / sample_rate steps, of the federation. A client keeps E + 1 models, one of each epoch's first
step: 4 times the model at E = 3, which a server that simulates many clients holds for each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.clipping.base import plain_number
from fed_dpsat.step.gradients.loss import logits_of
from fed_dpsat.step.optimizers.base import Over, State, StepInfo
from fed_dpsat.step.query import KNOWN_LOSSES, At, Composed, LossFn, OfOutputs, as_query, plain_tensors

MODELS, EPOCHS = "models", "epochs"
"""Old weights by place, and of which epoch those of a place are."""


@dataclass(frozen=True, kw_only=True)
class SAF(Over):
    """SAF: ``base`` on a loss that stays near its outputs of ``saf_epochs`` epochs ago (Du et al. 2022).

    ``saf_weight`` is the paper's lambda, ``saf_temperature`` its tau. Raises ``SettingError``.
    """

    sample_rate: float
    saf_weight: float = 0.3
    saf_temperature: float = 5.0
    saf_epochs: int = 3
    moves_like_base: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, bound, good in (
            ("saf_weight", self.saf_weight, "in [0, inf)", 0 <= self.saf_weight < math.inf),
            ("saf_temperature", self.saf_temperature, "in (0, inf)", 0 < self.saf_temperature < math.inf),
            ("saf_epochs", self.saf_epochs, "at least 1", self.saf_epochs >= 1),
            ("sample_rate", self.sample_rate, "in (0, 1]", 0 < self.sample_rate <= 1),
        ):
            if not good:
                raise SettingError(name, value, bound, "the authors' code has 0.3, 5 and 2 or 3")

    @property
    def carries(self) -> tuple[str, ...]:
        """Old weights, if they have a weight in the loss."""
        return (MODELS, EPOCHS) if self.saf_weight else ()

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """Where ``base`` looks, with the term in the loss once there are old weights."""
        at, old = super().query_point(params, state, info), self._old(state, info)
        if old is None:
            return at
        query = as_query(at)
        term = TrajectoryLoss(old=old, weight=self.saf_weight, temperature=self.saf_temperature)
        return replace(query, loss=term if query.loss is None else Composed(query.loss, term))

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base``; in the first of an epoch, ``params`` take the place of the oldest model."""
        moved, after = super().update(params, private_gradient, state, info)
        if self.saf_weight == 0:
            return moved, after
        known, epoch = state.get(EPOCHS, {}), self._epoch(info)
        if known and max(int(e) for e in known.values()) >= epoch:
            return moved, after
        place = str(epoch % (self.saf_epochs + 1))
        models = {**state.get(MODELS, {}), place: params}
        return moved, {**after, MODELS: models, EPOCHS: {**known, place: torch.tensor(epoch)}}

    def _epoch(self, info: StepInfo) -> int:
        return info.index // math.ceil(1 / self.sample_rate)

    def _old(self, state: State, info: StepInfo) -> Params | None:
        latest = self._epoch(info) - self.saf_epochs
        known = [(int(epoch), place) for place, epoch in state.get(EPOCHS, {}).items()]
        enough = [(epoch, place) for epoch, place in known if epoch <= latest]
        old: Params | None = state[MODELS][max(enough)[1]] if enough and self.saf_weight else None
        return old


@dataclass(frozen=True, kw_only=True, eq=False)
class TrajectoryLoss:
    """Wraps a loss: adds ``weight`` times the ``divergence`` of its outputs from those at ``old``."""

    old: Params
    weight: float
    temperature: float

    def __post_init__(self) -> None:
        plain_tensors(self.old)
        for name in ("weight", "temperature"):
            object.__setattr__(self, name, plain_number(f"saf_{name}", getattr(self, name)))

    def __call__(self, loss_fn: LossFn) -> LossFn:
        """The loss with that term; raises ``SettingError`` for one without outputs."""
        if not isinstance(loss_fn, OfOutputs):
            raise SettingError(
                "optimizer", "saf", "for a loss without outputs", "use ModelLoss, or a loss with criterion and outputs"
            )
        made: OfOutputs = loss_fn

        def loss(params: Params, inputs: Tensor, targets: Tensor, /) -> Tensor:
            now = made.outputs(params, inputs)
            then = logits_of(made.outputs(self.old, inputs)).detach()
            return made.criterion(now, targets) + self.weight * divergence(then, logits_of(now), self.temperature)

        return loss


KNOWN_LOSSES.append(TrajectoryLoss)


def divergence(then: Tensor, now: Tensor, temperature: float) -> Tensor:
    """``temperature^2 KL(softmax(then / temperature) || softmax(now / temperature))``, ``[B]`` from ``[B, K]``."""
    p, q = (functional.log_softmax(outputs / temperature, dim=1) for outputs in (then, now))
    return functional.kl_div(q, p, reduction="none", log_target=True).flatten(1).sum(1) * temperature**2


OPTIMIZERS = {"saf": SAF}
