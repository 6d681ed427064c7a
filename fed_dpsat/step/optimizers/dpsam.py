"""SAM in two steps: private, each of them paid for (DP-SAM), and not private, as the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.optimizers.base import CLOCK, PrivateOptimizer, State, check_space, climb, set_clock
from fed_dpsat.step.query import At, first_point, map_points

CLIMB = "climb"
"""The gradient of an odd call, until the even one has climbed it."""


@dataclass(frozen=True, kw_only=True)
class DPSAM:
    """DP-SAM: odd calls only ask for g, even calls descend with the gradient at ``w + rho * g / |g|``: two events.

    The two-step baseline of DP-SAT (Park et al. 2023, Section 4). ``base`` makes the descent. Each call has a Poisson
    batch of its own and costs an event, so a descent costs two: ``local_steps`` counts calls.

    ============================== ================================================================
    case                           result
    ============================== ================================================================
    the number of calls is odd     the state keeps g; the next round begins with the even call, at
                                   that round's w, along the g of the last round
    a client that lost its state   begins with an odd call
    local_steps = 1                every other round of a client leaves its w as it is
    g = 0                          the even call asks at w: 0 / 0 is 0
    rho = 0                        ``base`` at half the pace; the odd calls are paid for nothing
    ============================== ================================================================

    ``ascent_memory`` does not touch g: it is half of a step, not a memory of the last one.
    """

    base: PrivateOptimizer
    rho: float
    moves_like_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.rho < math.inf:
            raise SettingError("rho", self.rho, "in [0, inf)", "0.05 is usual")

    def init(self, params: Params) -> State:
        """The state of ``base``; the next call is an odd one."""
        return self.base.init(params)

    def query_point(self, params: Params, state: State) -> At:
        """Where ``base`` looks; in an even call, ``rho`` up the gradient of the odd one from there."""
        asked = self.base.query_point(params, state)
        check_space("optimizer", "dp-sam", params, first_point(asked))
        return map_points(asked, lambda at: climb(at, state.get(CLIMB), self.rho))

    def update(self, params: Params, private_gradient: Params, state: State) -> tuple[Params, State]:
        """Odd: remember ``private_gradient`` and stay. Even: the step of ``base`` at the unperturbed ``params``."""
        if CLIMB in state:
            return self.base.update(
                params, private_gradient, {slot: kept for slot, kept in state.items() if slot != CLIMB}
            )
        if CLOCK in state:
            state = set_clock(state, int(state[CLOCK]["step"]) + 1)
        return params, {**state, CLIMB: private_gradient}


@dataclass(frozen=True, kw_only=True)
class SAM(DPSAM):
    """SAM without privacy, a reference: epsilon is inf (Foret et al. 2021, arXiv 2010.01412); FedSAM with fedavg.

    As ``DPSAM``: each of its two calls draws a batch, where the paper uses one for both. With ``sample_rate`` 1 that is
    the same. ``clip_norm = inf`` takes gradients as they are. Raises ``SettingError`` in a private run, but for the
    unit "client": there local gradients have no noise, so this is the local training of DP-FedSAM.
    """

    private: bool
    privacy_unit: str = "example"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.private and self.privacy_unit == "example":
            raise SettingError(
                "private",
                self.private,
                "false with optimizer 'sam', which is the reference without privacy",
                "set private=false and read epsilon as inf, or take dp-sat (1 event per step) or dp-sam (2)",
            )


OPTIMIZERS = {"dp-sam": DPSAM, "sam": SAM}
