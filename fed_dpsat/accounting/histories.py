"""The merged histories of all clients: a cohort costs array operations, and a merge per distinct history and event."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.accounting.by_client import ByClient
from fed_dpsat.accounting.event import History, PrivacyEvent, merge
from fed_dpsat.accounting.packed import Clients

NONE = 0
"""The number of the empty history, of clients without a charge."""


class Histories:
    """Clients with equal histories share one number and one object; numbers without a client are used again."""

    def __init__(self) -> None:
        self._clients: Clients = np.empty(0, dtype=np.int64)  # ascending
        self._numbers = np.empty(0, dtype=np.intp)  # of the history of each client
        self._histories: list[History] = [()]
        self._sizes = [0]  # clients with each history
        self._number_of: dict[History, int] = {(): NONE}
        self._free: list[int] = []

    def charge(self, cohort: ByClient[PrivacyEvent]) -> None:
        """Add an event to the history of each client of a cohort."""
        self._join(cohort.clients)
        found = self.of(cohort.clients).paired(cohort)
        after = np.empty(len(found.values), dtype=np.intp)
        for i, ((history, event), size) in enumerate(zip(found.values, np.bincount(found.which).tolist(), strict=True)):
            after[i] = number = self._number(merge([*history, event]))
            self._sizes[number] += size
            self._sizes[self._number_of[history]] -= size
        self._numbers[np.searchsorted(self._clients, cohort.clients)] = after[found.which]
        for history in {history for history, _ in found.values if history}:
            if not self._sizes[number := self._number_of[history]]:
                del self._number_of[history]
                self._free.append(number)

    def distinct(self) -> list[History]:
        """The histories that a client has."""
        return [history for history in self._number_of if history]

    def of(self, clients: Clients) -> ByClient[History]:
        """The histories of ``clients``, which ascend; an empty one without a charge."""
        at = np.searchsorted(self._clients, clients)
        which = np.full(len(clients), NONE, dtype=np.intp)
        known = ~self._absent(clients, at)
        which[known] = self._numbers[at[known]]
        return ByClient(clients=clients, which=which, values=self._histories)

    def all(self) -> ByClient[History]:
        """The history of each charged client."""
        return ByClient(clients=self._clients, which=self._numbers, values=self._histories)

    def _join(self, clients: Clients) -> None:
        """Give an empty history to each of ``clients`` that has none."""
        at = np.searchsorted(self._clients, clients)
        if not (new := self._absent(clients, at)).any():
            return
        self._clients = np.insert(self._clients, at[new], clients[new])
        self._numbers = np.insert(self._numbers, at[new], NONE)
        self._sizes[NONE] += int(new.sum())

    def _absent(self, clients: Clients, at: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which of ``clients`` have no charge; ``at`` is the place of each."""
        absent: NDArray[np.bool_] = at == len(self._clients)
        absent[~absent] = self._clients[at[~absent]] != clients[~absent]
        return absent

    def _number(self, history: History) -> int:
        if history not in self._number_of:
            if self._free:
                number = self._free.pop()
                self._histories[number], self._sizes[number] = history, 0
            else:
                number = len(self._histories)
                self._histories.append(history)
                self._sizes.append(0)
            self._number_of[history] = number
        return self._number_of[history]
