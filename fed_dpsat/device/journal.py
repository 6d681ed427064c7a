"""What a device was asked, and its last answer: so that an answer is made once and can be given twice.

A SQLite file beside the ledger, as durable as that and written under its lock. It is bookkeeping: without it the
budget stands, but answers and the optimizer's state are gone, so a server's repeated question is a new one.
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
    """What a device does not do, in words that may leave it: they tell of the request and the policy, never of data."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A question and its identity: ``digest`` covers all that the answer depends on, ``settings`` those of the run."""

    run: str
    round: int
    attempt: int
    settings: bytes
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The last answer: ``reply`` may leave, ``state`` is the optimizer's and stays."""

    number: int
    run: str
    settings: bytes
    round: int
    attempt: int
    reply: bytes
    state: bytes


class Journal:
    """The journal at ``path``, made if absent. Raises ``LedgerError`` where it cannot be read or written."""

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
        """The number under which ``request`` was noted; None for a new one.

        Raises ``Refusal`` where the run had other settings before, or its round and attempt another content.
        """
        with storage.explained(self.path, "read"):
            run = self._file.execute("SELECT settings FROM runs WHERE run = ?", (request.run,)).fetchone()
            found = self._file.execute(
                "SELECT number, digest FROM requests WHERE run = ? AND round = ? AND attempt = ?",
                (request.run, request.round, request.attempt),
            ).fetchone()
        if run is not None and run[0] != request.settings:
            raise Refusal(f"run {request.run} has other settings than it began with; start a new run for new settings")
        if found is not None and found[1] != request.digest:
            raise Refusal(
                f"round={request.round}, attempt={request.attempt} of run {request.run} had other content before; "
                "ask for a new attempt, which is charged anew"
            )
        return None if found is None else int(found[0])

    def last(self) -> int:
        """The highest number that was given to a request; 0 for none."""
        with storage.explained(self.path, "read"):
            return int(self._file.execute("SELECT COALESCE(MAX(number), 0) FROM requests").fetchone()[0])

    def begin(self, request: Request, number: int) -> None:
        """Note a new request, on disk when this returns."""
        with storage.transaction(self._file, self.path):
            self._file.execute("INSERT OR IGNORE INTO runs VALUES (?, ?)", (request.run, request.settings))
            row = (number, request.run, request.round, request.attempt, request.digest)
            self._file.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?)", row)

    def finish(self, request: Request, number: int, reply: bytes, state: bytes) -> None:
        """Keep the answer in the place of the last one, on disk when this returns: now it may leave."""
        row = (number, request.run, request.settings, request.round, request.attempt, reply, state)
        with storage.transaction(self._file, self.path):
            self._file.execute("INSERT OR REPLACE INTO kept VALUES (0, ?, ?, ?, ?, ?, ?, ?)", row)

    def kept(self) -> Kept | None:
        """The last answer."""
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
    """A journal that is closed at the end."""
    journal = Journal(path)
    with closing(journal._file):
        yield journal
