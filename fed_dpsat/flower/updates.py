"""A strategy as one function of the clients' updates, with the known noise of each update.

Everything in a reply is public or already noised: the update, ``num-examples``, and the charged event (noise
multiplier, sample rate, steps). With ``lr`` and ``clip_norm`` from the configuration, they give the variance of the
noise in an update, without a look at it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fed_dpsat.client.known_noise import KnownNoise as KnownNoise  # strategies import it from here
from fed_dpsat.flower.wire import compat, records

Vector = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, eq=False)
class Updates:
    """The valid replies of a round, in the order of clients.

    ``moves[K, d]``: each client's model minus the global one, flat; ``shares[K]``: ``num-examples`` over their sum;
    ``variances[K]``: of the known noise, per coordinate of the move.
    """

    moves: Vector
    shares: Vector
    variances: Vector

    @property
    def mean(self) -> Vector:
        """``[d]``, weighted by size: the step of FedAvg."""
        move: Vector = self.shares @ self.moves
        return move

    @property
    def mean_variance(self) -> float:
        """The variance of the noise in ``mean``, per coordinate."""
        return float(self.shares**2 @ self.variances)

    def excess(self, center: Vector | float = 0.0) -> Vector:
        """``[K]``: squared distances from ``center`` less the expectation of the noise in them, at least 0."""
        squared = np.square(self.moves - center).sum(axis=1)
        beyond: Vector = np.maximum(squared - self.moves.shape[1] * self.variances, 0.0)
        return beyond

    @property
    def spread(self) -> Vector:
        """``[K]``: the standard deviation of a squared norm of noise alone, sqrt(2 d) variances (chi-squared)."""
        found: Vector = math.sqrt(2 * self.moves.shape[1]) * self.variances
        return found


class UpdateStrategy(FedAvg):
    """The global model plus ``move(round, updates)``; a subclass writes that method.

    Whole numbers are not trained and do not change. Raises ``SettingError`` if the noise is unknown.
    """

    def __init__(self, known_noise: KnownNoise) -> None:
        super().__init__()
        if known_noise.unknown:
            raise known_noise.unknown
        self._variance = known_noise.variance
        self._before = ArrayRecord()

    @abstractmethod
    def move(self, round: int, updates: Updates) -> Vector:
        """``[d]``: the change of the global model."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's messages; keeps the model in them."""
        self._before = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The model of ``configure_train`` plus the move."""
        updates = self._read(server_round, list(replies))
        before, self._before = self._before, ArrayRecord()
        return _moved(before, self.move(server_round, updates)), None

    def _read(self, round: int, replies: Sequence[Message]) -> Updates:
        before = _flat(self._before)
        events = [records.read_event(reply.content)[-1] for reply in replies]
        sizes = [float(reply.content[records.METRICS][records.NUM_EXAMPLES]) for reply in replies]  # type: ignore
        return Updates(
            moves=np.stack([_flat(reply.content.array_records[records.ARRAYS]) - before for reply in replies]),
            shares=np.asarray(sizes) / math.fsum(sizes),
            variances=np.asarray(
                [self._variance(event, size, round) for event, size in zip(events, sizes, strict=True)]
            ),
        )


def _is_float(array: Array) -> bool:
    return np.issubdtype(np.dtype(array.dtype), np.floating)


def _flat(arrays: ArrayRecord) -> Vector:
    return np.concatenate([compat.view(a).ravel() for a in arrays.values() if _is_float(a)])


def _moved(before: ArrayRecord, move: Vector) -> ArrayRecord:
    after, start = ArrayRecord(), 0
    for name, array in before.items():
        if not _is_float(array):
            after[name] = array
            continue
        values = compat.view(array)
        step = move[start : start + values.size].reshape(values.shape)
        after[name], start = compat.Array(np.asarray(values + step, dtype=values.dtype)), start + values.size
    return after
