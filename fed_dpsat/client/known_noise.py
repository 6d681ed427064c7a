"""The known noise in the update of a client: public numbers of a configuration give its variance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.optimizers.chain import split_chain
from fed_dpsat.step.optimizers.dpsgd import SCHEDULES

SGD_STEPS = ("dp-sgd", "dp-sat", "dp-sat-momentum", "extrapolated")
"""Optimizers whose step is ``-lr`` times the private gradient, and so ``-lr`` times its noise."""


@dataclass(frozen=True, kw_only=True)
class KnownNoise:
    """The variance of the noise in a client's update: the sum over ``event.steps`` SGD steps at ``lr``.

    Noise of one step is ``lr * noise_multiplier * clip_norm / (sample_rate * num_examples)`` per coordinate. With
    ``weight_decay`` this is an upper bound. ``unknown`` is the reason if the noise of a run depends on more.
    """

    lr: float
    clip_norm: float
    lr_schedule: str = "constant"
    num_rounds: int = 1
    unknown: SettingError | None = None

    @classmethod
    def of(cls, config: RunConfig) -> KnownNoise:
        """The noise of ``config``; unknown for momentum, adaptive clipping and steps other than those of SGD."""
        wrong = [
            SettingError(name, getattr(config, name), f"{bound}, so noise is unknown to {config.strategy!r}", remedy)
            for name, good, bound, remedy in (
                ("momentum", config.momentum == 0, "0", "set it to 0, or use strategy='fedavg'"),
                ("clipping", config.clipping != "adaptive", "of a fixed bound", "use flat clipping"),
                ("noise_distribution", config.noise_distribution == "gaussian", "gaussian", "use strategy='fedavg'"),
                ("optimizer", config.optimizer in SGD_STEPS, f"one of {', '.join(SGD_STEPS)}", "choose one of those"),
                ("local_averaging", not config.local_averaging, "empty", "an average has less noise; leave it empty"),
                ("local_models", config.local_models == 0, "0", "a client's half moves models by more than SGD steps"),
                ("buffer_size", config.buffer_size == 0, "0", "updates that set out earlier are scaled; use fedavg"),
                ("update_codec", config.update_codec in ("fp32", "bf16"), "fp32 or bf16", "send whole updates"),
                (
                    "base_optimizer",
                    set(split_chain(config.base_optimizer)) <= set(SGD_STEPS),
                    f"made of {', '.join(SGD_STEPS)}",
                    "use dp-sgd",
                ),
            )
            if not good
        ]
        return cls(
            lr=config.lr,
            clip_norm=config.clip_norm,
            lr_schedule=config.lr_schedule,
            num_rounds=config.num_rounds,
            unknown=wrong[0] if wrong else None,
        )

    def variance(self, event: PrivacyEvent, num_examples: float, round: int) -> float:
        """Per coordinate of the update that a client of ``num_examples`` sends in ``round`` (from 1)."""
        if event.noise_multiplier == 0:
            return 0.0
        total, first = self.num_rounds * event.steps, (round - 1) * event.steps
        rates = [self.lr * SCHEDULES[self.lr_schedule](min(s / total, 1)) for s in range(first, first + event.steps)]
        of_one_step = event.noise_multiplier * self.clip_norm / (event.sample_rate * num_examples)
        return math.fsum(rate**2 for rate in rates) * of_one_step**2
