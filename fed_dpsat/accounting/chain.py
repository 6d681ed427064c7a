"""A hash chain in SQLite: it detects a row that was edited, removed or moved.

The hash of a row is the SHA-256 of the previous hash and the row as JSON, with floats in hex. ``head`` holds the number
of rows and the last hash. The chain is not a signature: an attacker can rewrite every hash, or restore an older copy of
the file. Only a head that is stored elsewhere detects that, so publish the head with the result.
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
    """The ledger is invalid, or cannot be read or written; the message gives a remedy. Writes are atomic."""


def link(previous: bytes, row: Sequence[object]) -> bytes:
    """Hash of a row that follows the row with the hash ``previous``; its first value is the sequence number."""
    plain = [value.hex() if isinstance(value, float) else value for value in row]
    return hashlib.sha256(previous + json.dumps(plain, separators=(",", ":"), default=str).encode()).digest()


def head(connection: sqlite3.Connection, chain: str) -> tuple[int, bytes]:
    """Number of rows and last hash of ``charges`` or ``outcomes``, as the file states them."""
    found = connection.execute("SELECT rows, hash FROM head WHERE chain = ?", (chain,)).fetchone()
    if found is None:
        raise LedgerError(f"the ledger has no head for {chain}: it was edited; restore it from a backup")
    return tuple(found)


def append(connection: sqlite3.Connection, chain: str, rows: Sequence[Sequence[object]]) -> None:
    """Add rows to a chain and update its head; call it inside a ``transaction``."""
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
    """Read a whole chain; raises ``LedgerError`` for a row or a head that was changed."""
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
            f"the {expected} rows of {chain} do not match the head: rows were added or removed at the end; "
            "restore the ledger from a backup"
        )
