"""Conformance of partitions: clients share no example, no client is empty, equal seeds give equal parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fed_dpsat.testing.conformance import require, run_checks

NUM_CLIENTS = (1, 2, 7)
CLASSES, SMALLEST, USERS = 10, 8, 20


@dataclass(frozen=True, kw_only=True)
class Subject:
    """``factory`` and the data that it divides; ``labels`` are None if they are no classes."""

    factory: Callable[..., Any]
    labels: np.ndarray | None
    columns: Mapping[str, np.ndarray]
    num_examples: int
    num_clients: Sequence[int]

    def given(self, num_clients: int) -> dict[str, Any]:
        """What a run gives to a factory, as copies."""
        return {
            "labels": None if self.labels is None else self.labels.copy(),
            "columns": {name: values.copy() for name, values in self.columns.items()},
            "num_examples": self.num_examples,
            "num_clients": num_clients,
            "seed": 0,
        }

    def deal(self, given: Mapping[str, Any]) -> Any:
        """The parts, from a call with those of ``given`` that the factory names."""
        taken = inspect.signature(self.factory).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        return self.factory(**{name: value for name, value in given.items() if anything or name in taken})

    def dealt(self) -> list[tuple[int, list[Any]]]:
        """The parts for each number of clients."""
        return [(count, list(self.deal(self.given(count)))) for count in self.num_clients]


def check_partition(
    factory: Callable[..., Any],
    *,
    labels: np.ndarray | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
    num_examples: int = 0,
    num_clients: Sequence[int] = NUM_CLIENTS,
) -> list[str]:
    """Run the suite on a function of ``labels``, ``columns``, ``num_examples``, ``num_clients`` and ``seed``.

    The function can name any of them, and returns one array of indices of the training split for each client. The
    default of ``labels`` (int64 ``[N]``) has ten classes of 8 to 26 examples; with ``num_examples`` above 0 and without
    ``labels`` the data has no classes. ``columns`` holds arrays ``[N]`` by name; the default are "user", texts of 20
    values, and "number", floats. Returns the names of the checks; raises ``ConformanceError``.
    """
    if labels is not None:
        labels = labels.astype(np.int64)
    elif not num_examples:
        labels = np.repeat(np.arange(CLASSES), SMALLEST + 2 * np.arange(CLASSES))
    total = num_examples if labels is None else len(labels)
    if columns is None:
        places = np.arange(total)
        columns = {"user": (7 * places % USERS).astype(str), "number": 1 / (1 + places)}
    subject = Subject(factory=factory, labels=labels, columns=columns, num_examples=total, num_clients=num_clients)
    return run_checks("partition", CHECKS, subject)


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
    total = subject.num_examples
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
                remedy="use num_examples, which validation_share makes smaller than the data set",
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


def labels_and_columns_are_left_alone(subject: Subject) -> None:
    """The function does not change its labels and columns."""
    for count in subject.num_clients:
        given = subject.given(count)
        subject.deal(given)
        now = {"labels": given["labels"], **given["columns"]}
        for name, before in {"labels": subject.labels, **subject.columns}.items():
            changed = () if before is None else np.flatnonzero(now[name] != before).tolist()
            require(
                not changed,
                expected=f"unchanged {name}",
                seen=f"{len(changed)} changed, the first at {changed[:1]}",
                remedy="shuffle a permutation of indices, not the arrays",
            )


CHECKS = (
    gives_one_part_per_client,
    parts_are_places_in_the_training_split,
    no_client_is_empty,
    no_example_is_dealt_twice,
    the_same_seed_deals_the_same,
    labels_and_columns_are_left_alone,
)
