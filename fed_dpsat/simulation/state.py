"""The state that a client keeps between rounds: in the memory of a process, and in files that outlive it.

The path of a state names its round: ``state/<client>/<round>.state``. The previous state stays until the next round, so
a client whose worker or driver died repeats its round from the same state. Files are not synced: they survive a killed
process, but not a power failure. ``fed_dpsat.run.state_file`` defines the format.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fed_dpsat.flower.wire import compat
from fed_dpsat.run.state_file import ARRAYS, SUFFIX, Record, StateError, read_state, write_state

__all__ = ["StateError", "StateStore", "kept_rounds"]

KINDS: dict[str, Any] = {ARRAYS: compat.record_of, "metrics": MetricRecord, "config": ConfigRecord}
REMEMBERED_BYTES = 1 << 30
"""Largest size of the arrays in memory; older states are read from their files."""


class StateStore:
    """States by client, in ``folder``; without a folder they live as long as this object."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._remembered: OrderedDict[int, tuple[int, RecordDict]] = OrderedDict()
        self._bytes = 0

    def load(self, client: int, round: int | None) -> RecordDict:
        """A new record dict with the state of ``client`` after ``round``; empty for None. Raises ``StateError``."""
        if round is None:
            return RecordDict()
        known = self._remembered.get(client)
        if known is not None and known[0] == round:
            self._remembered.move_to_end(client)
            return RecordDict({**known[1]})
        if self._folder is None:
            raise StateError(f"the state of client {client} after round {round} is lost; start a new run")
        return _from_plain(read_state(_path(self._folder, client, round)))

    def save(self, client: int, round: int, state: RecordDict, before: int | None) -> None:
        """Store ``state``, keep the state of the round ``before``, and delete older ones."""
        self._forget(client)
        self._remembered[client] = round, state
        self._bytes += _size(state)
        if self._folder is None:
            return
        path = _path(self._folder, client, round)
        write_state(path, _to_plain(state))
        if before != round:  # a client may train several times in one round, each time from the previous round
            for other in path.parent.iterdir():
                if other.name not in (path.name, f"{before}{SUFFIX}"):
                    other.unlink(missing_ok=True)
        while self._bytes > REMEMBERED_BYTES:
            self._forget(next(iter(self._remembered)))

    def _forget(self, client: int) -> None:
        if client in self._remembered:
            self._bytes -= _size(self._remembered.pop(client)[1])


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
