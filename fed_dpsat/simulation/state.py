"""What clients keep from round to round: in the memory of who has it, and in files that outlive a process.

A state is filed under the round that made it: ``state/<client>/<round>.state``. The one before stays until the next
round, so that a client whose worker or driver died starts its round again from where it was. Nothing is synced to the
disk: files survive a killed process, not a power cut. How a file is written is in ``fed_dpsat.run.state_file``.
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
"""Arrays that one process remembers; what is older is read from its file again."""


class StateStore:
    """States by client, under ``folder``; without one they live as long as this object."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._remembered: OrderedDict[int, tuple[int, RecordDict]] = OrderedDict()
        self._bytes = 0

    def load(self, client: int, round: int | None) -> RecordDict:
        """A fresh container with what ``client`` kept in ``round``; empty for None. Raises ``StateError``."""
        if round is None:
            return RecordDict()
        known = self._remembered.get(client)
        if known is not None and known[0] == round:
            self._remembered.move_to_end(client)
            return RecordDict({**known[1]})
        if self._folder is None:
            raise StateError(f"the state of client {client} after round {round} is gone")
        return _from_plain(read_state(_path(self._folder, client, round)))

    def save(self, client: int, round: int, state: RecordDict, before: int | None) -> None:
        """Keep ``state``, and that of the round ``before``; older ones go."""
        self._forget(client)
        self._remembered[client] = round, state
        self._bytes += _size(state)
        if self._folder is None:
            return
        path = _path(self._folder, client, round)
        write_state(path, _to_plain(state))
        if before != round:  # a client may be asked several times in one round, and goes back to the last one
            for other in path.parent.iterdir():
                if other.name not in (path.name, f"{before}{SUFFIX}"):
                    other.unlink(missing_ok=True)
        while self._bytes > REMEMBERED_BYTES:
            self._forget(next(iter(self._remembered)))

    def _forget(self, client: int) -> None:
        if client in self._remembered:
            self._bytes -= _size(self._remembered.pop(client)[1])


def kept_rounds(folder: Path, up_to: int) -> dict[int, int]:
    """By client, the last round not after ``up_to`` that left a state in ``folder``.

    Raises ``StateError`` where an older version wrote them: begun anew, clients would forget what they had spent.
    """
    if older := next(folder.glob("*/*.pt"), None):
        raise StateError(f"{older} is of an older version of fed_dpsat; go on with that version, or start a new run")
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
