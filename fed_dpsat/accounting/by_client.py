"""A value of each client, with equal values held once: a cohort costs array operations, not objects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.accounting.packed import Clients

Value = TypeVar("Value", bound=Hashable)
Other = TypeVar("Other", bound=Hashable)

AnyClients: TypeAlias = Collection[int] | NDArray[np.integer[Any]]
"""Clients, in any order."""
Given: TypeAlias = Mapping[int, Value] | Iterable[tuple[AnyClients, Value]]
"""A value by client; or pairs of clients and the value that they share, with each client in one pair."""


@dataclass(frozen=True, kw_only=True)
class ByClient(Generic[Value]):
    """``values[which[i]]`` is the value of ``clients[i]``; ``clients[n]`` ascend, each once."""

    clients: Clients
    which: NDArray[np.intp]
    values: list[Value]

    @classmethod
    def of(cls, given: Given[Value]) -> ByClient[Value]:
        """``given`` in order, one value per object: not yet ``merged``.

        Raises ``ValueError`` for a client that is not an int in [0, 2**63) or occurs twice.
        """
        if isinstance(given, Mapping):
            clients, each = numbers(given), list(given.values())
            ids = np.fromiter(map(id, each), dtype=np.uint64, count=len(each))
            _, first, which = np.unique(ids, return_index=True, return_inverse=True)
            values = [each[i] for i in first]
        else:
            pairs = [(numbers(some), value) for some, value in given]
            clients = np.concatenate([np.empty(0, np.int64), *(some for some, _ in pairs)])
            which = np.repeat(np.arange(len(pairs)), np.array([len(some) for some, _ in pairs], dtype=np.intp))
            values = [value for _, value in pairs]
        order = np.argsort(clients, kind="stable")
        clients, which = clients[order], which[order]
        if (repeated := clients[1:][np.diff(clients) == 0]).size:
            raise ValueError(f"client={repeated[0]} occurs twice")
        return cls(clients=clients, which=which, values=values)

    def merged(self) -> ByClient[Value]:
        """The same with each value once, in the order of their first clients."""
        number: dict[Value, int] = {}
        present, first, which = np.unique(self.which, return_index=True, return_inverse=True)
        order = np.argsort(first)
        renumbered = np.empty(len(present), dtype=np.intp)
        for i in order.tolist():
            renumbered[i] = number.setdefault(self.values[present[i]], len(number))
        return ByClient(clients=self.clients, which=renumbered[which], values=list(number))

    def map(self, function: Callable[[Value], Other]) -> ByClient[Other]:
        """With ``function`` of each value."""
        return ByClient(clients=self.clients, which=self.which, values=[function(value) for value in self.values])

    def paired(self, other: ByClient[Other]) -> ByClient[tuple[Value, Other]]:
        """The values of both, for the same clients; each pair once."""
        pairs, which = np.unique(self.which * len(other.values) + other.which, return_inverse=True)
        values = [(self.values[i], other.values[j]) for i, j in (divmod(p, len(other.values)) for p in pairs.tolist())]
        return ByClient(clients=self.clients, which=which, values=values)

    def groups(self) -> Iterator[tuple[Clients, Value]]:
        """The clients of each value that has any."""
        order = np.argsort(self.which, kind="stable")
        which, starts = np.unique(self.which[order], return_index=True)
        for i, clients in zip(which.tolist(), np.split(self.clients[order], starts)[1:], strict=True):
            yield clients, self.values[i]

    def beyond(self, other: ByClient[Any]) -> ByClient[Value]:
        """Without the clients of ``other``."""
        if not len(other.clients):
            return self
        mask = ~np.isin(self.clients, other.clients, assume_unique=True)
        return ByClient(clients=self.clients[mask], which=self.which[mask], values=self.values)

    def conflict(self, other: ByClient[Value]) -> int | None:
        """The first client with another value in ``other``; clients in one of the two are no conflict."""
        if not len(other.clients):
            return None
        common, ours, theirs = np.intersect1d(self.clients, other.clients, assume_unique=True, return_indices=True)
        number = {value: i for i, value in enumerate(self.values)}
        renumbered = np.array([number.get(value, -1) for value in other.values], dtype=np.intp)
        differing = common[self.which[ours] != renumbered[other.which[theirs]]]
        return int(differing[0]) if differing.size else None

    def get(self, client: int) -> Value | None:
        """The value of ``client``; None without one."""
        i = int(np.searchsorted(self.clients, client))
        return self.values[self.which[i]] if i < len(self.clients) and self.clients[i] == client else None

    def to_dict(self) -> dict[int, Value]:
        """By client, ascending."""
        return dict(zip(self.clients.tolist(), map(self.values.__getitem__, self.which.tolist()), strict=True))


def numbers(clients: Iterable[int] | NDArray[np.integer[Any]]) -> Clients:
    """``clients[n]`` as int64; raises ``ValueError`` for one that is not an int in [0, 2**63)."""
    array = clients if isinstance(clients, np.ndarray) else _array(list(clients))
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and not 0 <= array.min() <= array.max() < 2**63):
        for client in array.tolist():
            check_number("client", client)
    return array.astype(np.int64, copy=False)


def check_number(name: str, number: object) -> None:
    """Raise ``ValueError`` unless ``number`` is an int in [0, 2**63)."""
    if type(number) is not int or not 0 <= number < 2**63:
        raise ValueError(f"{name}={number!r} is not an int in [0, 2**63)")


def _array(clients: list[int]) -> NDArray[Any]:
    """As int64, or as objects if that is not possible."""
    if set(map(type, clients)) <= {int}:
        with suppress(OverflowError):
            return np.array(clients, dtype=np.int64)
    return np.array(clients, dtype=object)
