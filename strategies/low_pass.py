"""A low-pass filter over the aggregated private update: an average of past updates, at the size of one.

*Reason*: signal changes slowly from round to round and noise does not, so averaging ``1 / (1 - beta)`` rounds leaves
the one and shrinks the variance of the other by ``(1 - beta) / (1 + beta)`` (DOPPLER, arXiv 2408.13460, of one pole).
Unlike FedAvgM the step does not grow with the memory: the filter has gain 1 and is corrected for its start, as Adam's.

*Bias*: the step lags ``beta / (1 - beta)`` rounds behind.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fed_dpsat.errors import SettingError


class LowPass(FedAvg):
    """The exponential average of FedAvg's steps."""

    only_mean = True

    def __init__(self, beta: float) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise SettingError("beta", beta, "in [0, 1)", "0 is FedAvg, 0.5 averages about two rounds")
        self.beta, self.kept = beta, 1.0
        self.before = ArrayRecord()
        self.slope: dict[str, np.ndarray] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.before = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None:
            return None, None
        self.kept *= self.beta
        after = ArrayRecord()
        for name, array in self.before.items():
            before = array.numpy()
            slope = self.beta * self.slope.get(name, 0.0) + (1 - self.beta) * (mean[name].numpy() - before)
            self.slope[name] = slope
            after[name] = Array(np.asarray(before + slope / (1 - self.kept)))
        return after, metrics


def low_pass(beta: float = 0.5) -> Strategy:
    """Exponential average of the mean updates, at the size of one: denoising by momentum."""
    return LowPass(beta)


STRATEGIES = {"low-pass": low_pass}
