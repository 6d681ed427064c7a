"""The proximal term of FedProx (Li et al., MLSys 2020, arXiv 1812.06127), on the client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fed_dpsat.params import Params
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, StepInfo, check_space
from fed_dpsat.step.query import At


@dataclass(frozen=True, kw_only=True)
class Proximal:
    """``base`` on the private gradient plus ``proximal_mu * (w - anchor)``, the slope of ``mu / 2 |w - anchor|^2``.

    ``anchor`` is the global model, so the term is a function of released quantities: it costs nothing. It is 0 in the
    first step of a round, and for what the global model does not have (a private head). A round may have it and the
    next one not, so the state is that of ``base``.
    """

    base: PrivateOptimizer
    anchor: Params
    proximal_mu: float
    moves_like_base: ClassVar[bool] = True

    def init(self, params: Params) -> State:
        """As ``base``."""
        return self.base.init(params)

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """As ``base``."""
        return self.base.query_point(params, state, info)

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base``, pulled towards the anchor."""
        check_space("proximal_mu", self.proximal_mu, params, private_gradient)
        return self.base.update(params, pulled(private_gradient, params, self.anchor, self.proximal_mu), state, info)


def pulled(gradient: Params, params: Params, anchor: Params, mu: float) -> Params:
    """``gradient + mu * (params - anchor)``, for the names that ``anchor`` has."""
    return {
        name: torch.add(g, params[name] - anchor[name], alpha=mu) if name in anchor else g
        for name, g in gradient.items()
    }
