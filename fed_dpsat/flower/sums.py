"""Weighted sums of replies in a fixed tree, so that the bits do not depend on who adds up what.

The clients of a round, in their order, are cut into blocks whose size depends on their number alone. A block is added
up one client after the other, by whoever has its replies, and then the blocks one after the other. Sums are in float32
(float64 for float64 and whole numbers), weighted by ``num-examples``.

====================== ===================================
case                   mean
====================== ===================================
one valid reply        that reply, to the bit
no valid reply         None
a reply that is none   not in the sum, and named
====================== ===================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from torch import Tensor

from fed_dpsat.client_level import bounded_move
from fed_dpsat.flower import records
from fed_dpsat.flower.replies import Failure

MAX_BLOCKS = 64
"""Enough to keep many workers busy, and few enough that their sums are cheap to send."""

OF_THE_MEAN = (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedProx)
"""Stock strategies that use the replies only through their weighted mean, but not what is derived from them."""

T = TypeVar("T")


def blocks(items: Sequence[T], multiple_of: int = 1) -> Iterator[Sequence[T]]:
    """Runs of equal length, a multiple of ``multiple_of``; at most ``MAX_BLOCKS`` of them."""
    size = max(1, -(-len(items) // (MAX_BLOCKS * multiple_of))) * multiple_of
    return (items[start : start + size] for start in range(0, len(items), size))


def only_mean(strategy: Strategy) -> bool:
    """Whether ``strategy`` uses replies only through their mean, weighted by ``num-examples``: it declares that."""
    if type(strategy) in OF_THE_MEAN:
        keys = strategy.weighted_by_key, strategy.arrayrecord_key  # type: ignore[attr-defined]
        return keys == (records.NUM_EXAMPLES, records.ARRAYS)
    return bool(getattr(strategy, "only_mean", False))


@dataclass(kw_only=True)
class Part:
    """What some clients' replies come to: metrics of the valid ones, failures, and ``scale * total``, their sum."""

    accepted: dict[int, Mapping[str, float]] = field(default_factory=dict)
    failed: dict[int, Failure] = field(default_factory=dict)
    total: dict[str, Tensor] | None = None
    scale: float = 1.0

    @property
    def weight(self) -> float:
        """The sum of weights."""
        return sum(metrics[records.NUM_EXAMPLES] for metrics in self.accepted.values())

    def mean(self) -> dict[str, Tensor] | None:
        """Weighted mean of the valid replies, in the types of the sum; None if there are none."""
        if self.total is None:
            return None
        if self.scale == self.weight:
            return self.total
        return {name: t / (self.weight / self.scale) for name, t in self.total.items()}

    def __getstate__(self) -> dict[str, Any]:
        arrays = None if self.total is None else {name: t.numpy() for name, t in self.total.items()}
        return {**self.__dict__, "total": arrays}  # arrays travel between processes without a copy, tensors do not

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = state["total"]
        self.__dict__.update(state)
        self.total = None if arrays is None else {name: torch.from_numpy(a) for name, a in arrays.items()}


def part_of(
    client: int,
    reply: Message | None,
    verdict: Mapping[str, float] | Failure | None,
    *,
    before: ArrayRecord | None = None,
    clip_norm: float | None = None,
) -> Part:
    """One client's reply, if there was one; its arrays are read and not copied.

    With a ``clip_norm`` it is the client's move from ``before``, bounded, and counts once whatever size it declares.
    """
    if reply is None or verdict is None or isinstance(verdict, Failure):
        return Part(failed={client: verdict} if isinstance(verdict, Failure) else {})
    arrays = records.arrays_in(reply.content, records.ARRAYS)
    assert arrays is not None  # or it would be a failure
    total = records.to_read(arrays)
    if clip_norm is not None and before is not None:
        move = bounded_move(total, records.to_read(before), clip_norm)
        return Part(accepted={client: verdict}, total=move, scale=1.0)
    return Part(accepted={client: verdict}, total=total, scale=verdict[records.NUM_EXAMPLES])


def merge(parts: Iterable[Part]) -> Part:
    """The sum of ``parts``, one after the other; two of them are in memory at a time."""
    merged, own = Part(), False
    for part in parts:
        merged.accepted |= part.accepted
        merged.failed |= part.failed
        if part.total is None:
            continue
        if merged.total is None:
            merged.total, merged.scale = part.total, part.scale
            continue
        if not own:
            merged.total = {name: t.to(_accumulator(t)) * merged.scale for name, t in merged.total.items()}
            merged.scale, own = 1.0, True
        for name, t in merged.total.items():
            t.add_(part.total[name].to(t.dtype), alpha=part.scale)
    return merged


def _accumulator(t: Tensor) -> torch.dtype:
    return torch.float32 if t.is_floating_point() and t.dtype.itemsize <= 4 else torch.float64
