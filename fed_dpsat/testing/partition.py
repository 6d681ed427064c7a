"""Conformance of partitions: clients share no example, no client is empty, equal seeds give equal parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fed_dpsat.testing.conformance import require, run_checks

NUM_CLIENTS = (1, 2, 7)
CLASSES, SMALLEST = 10, 8


@dataclass(frozen=True, kw_only=True)
class Subject:
    """``deal(labels, num_clients, seed)`` gives the parts of the factory."""

    deal: Callable[[np.ndarray, int, int], Any]
    labels: np.ndarray
    num_clients: Sequence[int]

    def dealt(self, seed: int = 0) -> list[tuple[int, list[Any]]]:
        """The parts for each number of clients."""
        return [(count, list(self.deal(self.labels.copy(), count, seed))) for count in self.num_clients]


def check_partition(
    factory: Callable[..., Any], *, labels: np.ndarray | None = None, num_clients: Sequence[int] = NUM_CLIENTS
) -> list[str]:
    """Run the suite on a function of ``labels[N]`` (int64), ``num_clients`` and ``seed``, or of some of them.

    The function returns one array of indices of the training split for each client. The default of ``labels`` has ten
    classes of 8 to 26 examples. Returns the names of the checks; raises ``ConformanceError``.
    """
    if labels is None:
        labels = np.repeat(np.arange(CLASSES), SMALLEST + 2 * np.arange(CLASSES))
    return run_checks(
        "partition", CHECKS, Subject(deal=_by_name(factory), labels=labels.astype(np.int64), num_clients=num_clients)
    )


def gives_one_part_per_client(subject: Subject) -> None:
    """``num_clients`` parts, no more and no fewer."""
    for count, parts in subject.dealt():
        require(
            len(parts) == count,
            expected=f"{count} parts for num_clients={count}",
            seen=f"{len(parts)}",
            remedy="return one array per client, also for one client",
        )


def parts_are_places_in_the_training_split(subject: Subject) -> None:
    """Integers in ``[0, N)``, in one dimension, and no mask."""
    total = len(subject.labels)
    for count, parts in subject.dealt():
        for client, part in enumerate(map(np.asarray, parts)):
            kind = f"{part.dtype}{list(part.shape)}"
            require(
                part.ndim == 1 and (part.dtype.kind in "iu" or not part.size),
                expected="integers [n] for each client",
                seen=f"{kind} for client {client} of {count}",
                remedy="np.flatnonzero converts a mask to indices",
            )
            low, high = (int(part.min()), int(part.max())) if part.size else (0, 0)
            require(
                low >= 0 and high < total,
                expected=f"indices in [0, {total})",
                seen=f"{low if low < 0 else high} for client {client} of {count}",
                remedy="use the given labels, which validation_share makes fewer than those of the data set",
            )


def no_client_is_empty(subject: Subject) -> None:
    """Each client has an example."""
    for count, parts in subject.dealt():
        empty = [client for client, part in enumerate(parts) if not len(part)]
        require(
            not empty,
            expected="an example for each client",
            seen=f"none for clients {empty[:5]} of {count}",
            remedy="give each empty client an example of the largest client",
        )


def no_example_is_dealt_twice(subject: Subject) -> None:
    """Each example belongs to one client, once: epsilon is for one example of one client."""
    for count, parts in subject.dealt():
        places, times = np.unique(np.concatenate([np.asarray(part).ravel() for part in parts]), return_counts=True)
        require(
            bool((times == 1).all()),
            expected="each example with one client, once",
            seen=f"example {places[times.argmax()]} {times.max()} times, with {count} clients",
            remedy="cut a permutation of the examples: np.array_split(order, num_clients)",
        )


def the_same_seed_deals_the_same(subject: Subject) -> None:
    """Each process computes the partition itself, so it may use only generators seeded by ``seed``."""
    first = subject.dealt()
    np.random.random()
    torch.rand(1)
    again = subject.dealt()
    same = all(
        len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        for (_, a), (_, b) in zip(first, again, strict=True)
    )
    require(
        same,
        expected="the same parts from the same seed",
        seen="other parts from a second call",
        remedy="draw only from np.random.default_rng(seed)",
    )


def labels_are_left_alone(subject: Subject) -> None:
    """The function does not change its labels."""
    for count in subject.num_clients:
        labels = subject.labels.copy()
        subject.deal(labels, count, 0)
        changed = np.flatnonzero(labels != subject.labels)
        require(
            not len(changed),
            expected="unchanged labels",
            seen=f"{len(changed)} changed, the first at {changed[:1].tolist()}",
            remedy="shuffle a permutation of indices, not the labels",
        )


CHECKS = (
    gives_one_part_per_client,
    parts_are_places_in_the_training_split,
    no_client_is_empty,
    no_example_is_dealt_twice,
    the_same_seed_deals_the_same,
    labels_are_left_alone,
)


def _by_name(factory: Callable[..., Any]) -> Callable[[np.ndarray, int, int], Any]:
    """``factory``, called like in a run with the arguments that it names."""
    taken = inspect.signature(factory).parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in taken)

    def deal(labels: np.ndarray, num_clients: int, seed: int) -> Any:
        given = {"labels": labels, "num_clients": num_clients, "seed": seed}
        named = {p.name for p in taken}
        return factory(**{name: value for name, value in given.items() if anything or name in named})

    return deal
