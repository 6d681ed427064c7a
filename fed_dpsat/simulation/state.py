"""The state that a client keeps between rounds: in the memory of a process, and in files that outlive it.

The path of a state names its round: ``state/<client>/<round>.state``; clients that train together have rows of a table
instead (``state_table``). The previous state stays until the next round, so
a client whose worker or driver died repeats its round from the same state. Files are not synced: they survive a killed
process, but not a power failure. ``fed_dpsat.run.state_file`` defines the format.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fed_dpsat.accounting.event import History
from fed_dpsat.flower.wire import compat
from fed_dpsat.flower.wire.records import Kept
from fed_dpsat.params import flatten, map_tree, unflatten
from fed_dpsat.run.state_file import ARRAYS, SUFFIX, Record, StateError, read_state, write_state
from fed_dpsat.simulation.state_table import EVENTS, Form, StateTable
from fed_dpsat.step.optimizers.base import State

__all__ = ["StateError", "StateStore", "kept_rounds"]

Since = Mapping[int, int]
"""The round of the stored state, by client."""

KINDS: dict[str, Any] = {ARRAYS: compat.record_of, "metrics": MetricRecord, "config": ConfigRecord}
REMEMBERED_BYTES = 1 << 30
"""Largest size of the arrays in memory; older states are read from their files."""


class StateStore:
    """States by client, in ``folder``; without a folder they live as long as this object.

    A state is the content of a context, or what a client of a stack keeps, as objects (``Kept``).
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._remembered: OrderedDict[int, tuple[int, RecordDict | Kept, int]] = OrderedDict()
        self._bytes = 0
        self._tables: dict[str, StateTable] = {}

    def load(self, client: int, round: int | None) -> RecordDict:
        """A new record dict with the state of ``client`` after ``round``; empty for None. Raises ``StateError``."""
        found = self._found(client, round)
        return found.content() if isinstance(found, Kept) else RecordDict({**found})

    def load_kept(self, client: int, round: int | None) -> Kept | None:
        """The same as objects; None for None, and for a client that keeps more. Raises ``StateError``."""
        found = self._found(client, round)
        return found if isinstance(found, Kept) else Kept.of(found)

    def save(self, client: int, round: int, state: RecordDict, before: int | None) -> None:
        """Store ``state``, keep the state of the round ``before``, and delete older ones."""
        self._remember(client, round, state, _size(state))
        if self._folder is None:
            return
        path = _path(self._folder, client, round)
        write_state(path, _to_plain(state))
        if before != round:  # a client may train several times in one round, each time from the previous round
            for other in path.parent.iterdir():
                if other.name not in (path.name, f"{before}{SUFFIX}"):
                    other.unlink(missing_ok=True)
        self._forget_some()

    def save_stack(
        self, clients: Sequence[int], round: int, stack: State, histories: list[History], since: Since
    ) -> None:
        """``save`` for clients of a stack, ``stack[K, ...]``; ``since`` has the round before of each that has one."""
        count = len(clients)
        # an empty tree is a name with a slash at its end
        leaves = {name: t.new_empty(count, 0) if name.endswith("/") else t for name, t in flatten(stack).items()}
        bytes_of_each = sum(t.nbytes for t in leaves.values()) // count
        for k, (client, history) in enumerate(zip(clients, histories, strict=True)):
            own = map_tree(lambda t, k=k: t[k].clone(), stack)  # a view would keep the stack alive
            self._remember(client, round, Kept(own, history), bytes_of_each)
        if self._folder is None:
            return
        before = [since.get(client) for client in clients]
        if max(map(len, histories)) > EVENTS or round in before:
            for client in clients:
                self.save(client, round, self.load(client, round), since.get(client))
            return
        for client in clients:  # of a round that is done again, and had a file when a client failed
            _path(self._folder, client, round).unlink(missing_ok=True)
        arrays = {name: t.numpy() for name, t in leaves.items()}
        form = Form.of(arrays)
        self._tables.setdefault(form.name, StateTable(self._folder, form)).write(
            clients, round, before, arrays, histories
        )
        self._forget_some()

    def _found(self, client: int, round: int | None) -> RecordDict | Kept:
        if round is None:
            return RecordDict()
        known = self._remembered.get(client)
        if known is not None and known[0] == round:
            self._remembered.move_to_end(client)
            return known[1]
        if self._folder is None:
            raise StateError(f"the state of client {client} after round {round} is lost; start a new run")
        path = _path(self._folder, client, round)
        if not path.exists():
            for table in StateTable.all_in(self._folder):
                if row := table.read(client, round):
                    arrays, history = row
                    return Kept(unflatten({name: torch.from_numpy(a.copy()) for name, a in arrays.items()}), history)
        return _from_plain(read_state(path))

    def _remember(self, client: int, round: int, state: RecordDict | Kept, size: int) -> None:
        self._forget(client)
        self._remembered[client] = round, state, size
        self._bytes += size

    def _forget_some(self) -> None:
        while self._bytes > REMEMBERED_BYTES:
            self._forget(next(iter(self._remembered)))

    def _forget(self, client: int) -> None:
        if client in self._remembered:
            self._bytes -= self._remembered.pop(client)[2]


def kept_rounds(folder: Path, up_to: int) -> dict[int, int]:
    """By client, the last round up to ``up_to`` with a state in ``folder``.

    Raises ``StateError`` for states of an older version: without them, clients would forget their spent budget.
    """
    if older := next(folder.glob("*/*.pt"), None):
        raise StateError(f"{older} is of an older version of fed_dpsat; continue with that version, or start a new run")
    found: dict[int, int] = {}
    for path in folder.glob(f"*/*{SUFFIX}"):
        client, round = int(path.parent.name), int(path.stem)
        if found.get(client, -1) < round <= up_to:
            found[client] = round
    for table in StateTable.all_in(folder):
        for client, round in table.rounds(up_to).items():
            found[client] = max(found.get(client, -1), round)
    return found


def _path(folder: Path, client: int, round: int) -> Path:
    return folder / str(client) / f"{round}{SUFFIX}"


def _size(state: RecordDict) -> int:
    arrays = (record for record in state.values() if isinstance(record, ArrayRecord))
    return sum(compat.view(a).nbytes for record in arrays for a in record.values())


def _to_plain(state: RecordDict) -> dict[str, Record]:
    plain: dict[str, Record] = {}
    for key, record in state.items():
        if isinstance(record, ArrayRecord):
            plain[key] = ARRAYS, {name: compat.view(array) for name, array in record.items()}
        else:
            plain[key] = ("metrics" if isinstance(record, MetricRecord) else "config"), dict(record)
    return plain


def _from_plain(plain: dict[str, Record]) -> RecordDict:
    return RecordDict({key: KINDS[kind](items) for key, (kind, items) in plain.items()})
