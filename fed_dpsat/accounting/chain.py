"""Rows that show when one of them was edited, removed or moved: a hash chain in SQLite.

The hash of a row is sha256 of the hash of the row before it and the row as JSON, floats in hex; ``head`` holds
the number of rows and the last hash. It is not a signature: who rewrites every hash, or puts back an older copy
of the file, is found only by a head noted elsewhere, so publish it with the result.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence

from fed_dpsat.errors import RunError

GENESIS = bytes(32)
COLUMNS = {
    "charges": "client, round, attempt, kind, noise_multiplier, sample_rate, steps",
    "outcomes": "client, round, attempt, outcome",
}


class LedgerError(RunError):
    """The ledger cannot be trusted, read or written; the message says what to do. Nothing is half-written."""


def link(previous: bytes, row: Sequence[object]) -> bytes:
    """Hash of a row (its sequence number first) that follows the row with the hash ``previous``."""
    plain = [value.hex() if isinstance(value, float) else value for value in row]
    return hashlib.sha256(previous + json.dumps(plain, separators=(",", ":"), default=str).encode()).digest()


def head(connection: sqlite3.Connection, chain: str) -> tuple[int, bytes]:
    """Number of rows and last hash that the file claims for ``charges`` or ``outcomes``."""
    found = connection.execute("SELECT rows, hash FROM head WHERE chain = ?", (chain,)).fetchone()
    if found is None:
        raise LedgerError(f"the ledger has no head for {chain}: it was edited; restore it from a backup")
    return tuple(found)


def append(connection: sqlite3.Connection, chain: str, rows: Sequence[Sequence[object]]) -> None:
    """Add rows to a chain and move its head; inside a ``transaction``."""
    count, last = head(connection, chain)
    linked = []
    for row in rows:
        count += 1
        last = link(last, (count, *row))
        linked.append((count, *row, last))
    marks = ", ".join("?" * (2 + len(COLUMNS[chain].split(", "))))
    connection.executemany(f"INSERT INTO {chain} (seq, {COLUMNS[chain]}, hash) VALUES ({marks})", linked)
    connection.execute("UPDATE head SET rows = ?, hash = ? WHERE chain = ?", (count, last, chain))


def check(connection: sqlite3.Connection, chain: str) -> None:
    """Read a chain to its end; ``LedgerError`` at the first row, or the head, that is not as written."""
    expected, last = 0, GENESIS
    for seq, *row, stored in connection.execute(f"SELECT seq, {COLUMNS[chain]}, hash FROM {chain} ORDER BY seq"):
        expected += 1
        last = link(last, (seq, *row))
        if seq != expected or stored != last:
            raise LedgerError(
                f"{chain} row {expected} was edited, removed or moved; restore the ledger from a backup: its epsilon "
                "cannot be trusted"
            )
    if (expected, last) != head(connection, chain):
        raise LedgerError(
            f"the {expected} rows of {chain} are not what the head counts: some were added or removed at the end; "
            "restore the ledger from a backup"
        )
