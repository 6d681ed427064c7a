"""What the inner strategy is given at the end of a round, and what is taken from it.

A strategy of the mean alone is given one reply, that mean: added up in the fixed tree of ``sums``, or what a round of
the unit "client" releases. Any other is given each valid reply, in the order of clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, MetricRecordValues, RecordDict
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fed_dpsat.flower import sums
from fed_dpsat.flower.client_release import ClientRelease
from fed_dpsat.flower.judge import Verdicts
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.flower.wire.records import RecordError

Aggregate = tuple[ArrayRecord | None, MetricRecord | None]


@dataclass(frozen=True, kw_only=True)
class Handover:
    """One round: ``inner`` is shown replies to ``question`` of clients that began with ``model``.

    With a ``release`` it sees what that makes of their sum, in this ``attempt``, and nothing else. Raises
    ``FederationError`` where it answers with no model.
    """

    inner: Strategy
    round: int
    model: ArrayRecord
    question: Message
    release_counts: bool
    release: ClientRelease | None
    attempt: int

    @property
    def clip_norm(self) -> float | None:
        """The bound of one client's change, where there is one."""
        return self.release.mechanism.clip_norm if self.release else None

    def all(self, order: Sequence[int], valid: Mapping[int, Message], verdicts: Verdicts) -> Aggregate:
        """The ``valid`` replies; ``order`` is of all clients they might be from, and so the tree of their sum."""
        if not sums.only_mean(self.inner):
            return self._checked(self.inner.aggregate_train(self.round, [valid[c] for c in sorted(valid)]))
        parts = (
            sums.part_of(c, valid.get(c), verdicts.get(c), before=self.model, clip_norm=self.clip_norm) for c in order
        )
        return self.mean(sums.merge(parts))

    def mean(self, total: sums.Part) -> Aggregate:
        """The mean of ``total``, or what the round releases of it."""
        if self.release:
            released = self.release.model(total, self.model, round=self.round, attempt=self.attempt)
            return self._one(released, {records.NUM_EXAMPLES: 1})
        metrics: dict[str, MetricRecordValues] = {records.NUM_EXAMPLES: total.weight}
        if self.release_counts:
            counts = [m[records.NONFINITE] * m[records.NUM_EXAMPLES] for m in total.accepted.values()]
            metrics[records.NONFINITE] = sum(counts) / total.weight
        return self._one(records.to_arrays(total.mean() or {}), metrics)

    def _one(self, arrays: ArrayRecord, metrics: dict[str, MetricRecordValues]) -> Aggregate:
        content = RecordDict({records.ARRAYS: arrays, records.METRICS: MetricRecord(metrics)})
        return self._checked(self.inner.aggregate_train(self.round, [Message(content, reply_to=self.question)]))

    def _checked(self, aggregate: Aggregate) -> Aggregate:
        """The arrays in the model's types (some stock strategies return float64); wrong or not finite is an error."""
        arrays, metrics = aggregate
        if arrays is None:
            return None, metrics
        name = type(self.inner).__name__
        if arrays.keys() != self.model.keys():
            raise FederationError(f"{name} returned {list(arrays)}, not {list(self.model)}")
        model = compat.record_of({k: _cast(compat.view(a), self.model[k].dtype) for k, a in arrays.items()})
        try:
            records.check_arrays(RecordDict({records.ARRAYS: model}), self.model)
        except RecordError as error:
            raise FederationError(
                f"{name} returned other parameters than the model's, or in another order: {error}"
            ) from error
        return model, metrics


def _cast(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """``array`` as ``dtype``; whole numbers are rounded, since a weighted mean of 17s may be 16.999."""
    whole = np.issubdtype(np.dtype(dtype), np.integer)
    return np.asarray(np.rint(array) if whole else array, dtype=dtype)
