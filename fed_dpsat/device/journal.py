"""The requests to a device and its last reply: the device computes a reply once and can send it again.

The journal is a SQLite file beside the ledger. It is as durable as the ledger, and the lock of the ledger covers it.
The budget does not depend on the journal. Without it, the last reply and the state of the optimizer are lost, and a
repeated request is a new one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fed_dpsat.accounting import storage
from fed_dpsat.errors import InputError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, settings BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
    digest BLOB NOT NULL, UNIQUE (run, round, attempt));
CREATE TABLE IF NOT EXISTS kept (
    slot INTEGER PRIMARY KEY CHECK (slot = 0), number INTEGER NOT NULL, run TEXT NOT NULL, settings BLOB NOT NULL,
    round INTEGER NOT NULL, attempt INTEGER NOT NULL, reply BLOB NOT NULL, state BLOB NOT NULL);
"""


class Refusal(InputError):
    """A device refuses a request; the text may leave: it describes the request and the policy, never data."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request: ``digest`` covers everything that the reply depends on, ``settings`` the settings of the run."""

    run: str
    round: int
    attempt: int
    settings: bytes
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The last reply: ``reply`` may leave; ``state`` belongs to the optimizer and stays."""

    number: int
    run: str
    settings: bytes
    round: int
    attempt: int
    reply: bytes
    state: bytes


class Journal:
    """The journal at ``path``, created if it is missing. Raises ``LedgerError`` if it cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage.explained(path, "open"):
            self._file = sqlite3.connect(path, isolation_level=None, timeout=storage.BUSY_SECONDS)
            try:
                self._file.execute("PRAGMA journal_mode = DELETE")
                self._file.execute("PRAGMA synchronous = EXTRA")
                self._file.executescript(_SCHEMA)
            except BaseException:
                self._file.close()
                raise

    def number(self, request: Request) -> int | None:
        """The number of a known ``request``; None for a new one.

        Raises ``Refusal`` if the run had other settings before, or its round and attempt had other content.
        """
        with storage.explained(self.path, "read"):
            run = self._file.execute("SELECT settings FROM runs WHERE run = ?", (request.run,)).fetchone()
            found = self._file.execute(
                "SELECT number, digest FROM requests WHERE run = ? AND round = ? AND attempt = ?",
                (request.run, request.round, request.attempt),
            ).fetchone()
        if run is not None and run[0] != request.settings:
            raise Refusal(f"run {request.run} has other settings than at its start; start a new run for new settings")
        if found is not None and found[1] != request.digest:
            raise Refusal(
                f"round={request.round}, attempt={request.attempt} of run {request.run} had other content before; "
                "send a new attempt, which costs a new charge"
            )
        return None if found is None else int(found[0])

    def last(self) -> int:
        """The highest number of a request; 0 without requests."""
        with storage.explained(self.path, "read"):
            return int(self._file.execute("SELECT COALESCE(MAX(number), 0) FROM requests").fetchone()[0])

    def begin(self, request: Request, number: int) -> None:
        """Store a new request, on disk when this returns."""
        with storage.transaction(self._file, self.path):
            self._file.execute("INSERT OR IGNORE INTO runs VALUES (?, ?)", (request.run, request.settings))
            row = (number, request.run, request.round, request.attempt, request.digest)
            self._file.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?)", row)

    def finish(self, request: Request, number: int, reply: bytes, state: bytes) -> None:
        """Replace the last reply; it is on disk when this returns, so it may leave."""
        row = (number, request.run, request.settings, request.round, request.attempt, reply, state)
        with storage.transaction(self._file, self.path):
            self._file.execute("INSERT OR REPLACE INTO kept VALUES (0, ?, ?, ?, ?, ?, ?, ?)", row)

    def kept(self) -> Kept | None:
        """The last reply."""
        query = "SELECT number, run, settings, round, attempt, reply, state FROM kept"
        with storage.explained(self.path, "read"):
            row = self._file.execute(query).fetchone()
        if row is None:
            return None
        number, run, settings, round, attempt, reply, state = row
        return Kept(number=number, run=run, settings=settings, round=round, attempt=attempt, reply=reply, state=state)

    def rounds(self) -> dict[str, int]:
        """Number of requests by run."""
        with storage.explained(self.path, "read"):
            return dict(self._file.execute("SELECT run, COUNT(*) FROM requests GROUP BY run ORDER BY MIN(number)"))


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open a journal, and close it after the block."""
    journal = Journal(path)
    with closing(journal._file):
        yield journal
