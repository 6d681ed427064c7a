"""SAM in two steps: private, each of them paid for (DP-SAM), and not private, as the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.optimizers.base import Over, State, StepInfo, check_space, climb
from fed_dpsat.step.query import At, first_point, map_points

CLIMB = "climb"
"""The gradient of an odd call, until the even one has climbed it."""


@dataclass(frozen=True, kw_only=True)
class DPSAM(Over):
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

    ``ascent_memory`` does not touch g: it is half of a step, not a memory of the last one. If ``steps_per_round`` is
    even, no g is left over for a next round.
    """

    rho: float
    steps_per_round: int = 1
    moves_like_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.rho < math.inf:
            raise SettingError("rho", self.rho, "in [0, inf)", "0.05 is usual")
        base: object = self.base
        while base is not None:  # it would make half of a step in each of our steps
            if isinstance(base, DPSAM):
                raise SettingError(
                    "base_optimizer", "dp-sam or sam", "one that steps in each call", "name one of them once"
                )
            base = getattr(base, "base", None)

    @property
    def carries(self) -> tuple[str, ...]:
        """The gradient of an odd call that ended a round."""
        return (CLIMB,) if self.steps_per_round % 2 else ()

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """Where ``base`` looks; in an even call, ``rho`` up the gradient of the odd one from there."""
        asked = super().query_point(params, state, info)
        check_space("optimizer", "dp-sam", params, first_point(asked))
        return map_points(asked, lambda at: climb(at, state.get(CLIMB), self.rho))

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """Odd: remember ``private_gradient`` and stay. Even: the step of ``base`` at the unperturbed ``params``."""
        if CLIMB not in state:
            return params, {**state, CLIMB: private_gradient}
        moved, after = super().update(params, private_gradient, state, info)
        del after[CLIMB]
        return moved, after


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
        if self.private and self.privacy_unit != "client":
            raise SettingError(
                "private",
                self.private,
                "false with optimizer 'sam', which is the reference without privacy",
                "set private=false and read epsilon as inf, or take dp-sat (1 event per step) or dp-sam (2)",
            )


OPTIMIZERS = {"dp-sam": DPSAM, "sam": SAM}
