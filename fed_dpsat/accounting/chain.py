"""A hash chain in SQLite: it detects a row that was edited, removed or moved.

The hash of a row is the SHA-256 of the previous hash and the row as JSON, with floats in hex, and a packed list of
clients as a JSON list of its bytes in hex. The sequence number of a row counts the clients of all rows up to it.
``head`` holds the last number and the last hash. The chain is not a signature: an attacker can rewrite every hash, or
restore an older copy of the file. Only a head that is stored elsewhere detects that, so publish the head with the
result.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence

from fed_dpsat.accounting.packed import size
from fed_dpsat.errors import RunError

GENESIS = bytes(32)
COLUMNS = {
    "charges": "client, round, attempt, kind, noise_multiplier, sample_rate, steps",
    "outcomes": "client, round, attempt, outcome",
}
EDITED = "restore the ledger from a backup: its epsilon cannot be trusted"


class LedgerError(RunError):
    """The ledger is invalid, or cannot be read or written; the message gives a remedy. Writes are atomic."""


def link(previous: bytes, row: Sequence[object]) -> bytes:
    """Hash of a row that follows the row with the hash ``previous``; its first value is the sequence number."""
    text = json.dumps([_plain(value) for value in row], separators=(",", ":"))
    return hashlib.sha256(previous + text.encode()).digest()


def head(connection: sqlite3.Connection, chain: str) -> tuple[int, bytes]:
    """Last sequence number and last hash of ``charges`` or ``outcomes``, as the file states them."""
    found = connection.execute("SELECT rows, hash FROM head WHERE chain = ?", (chain,)).fetchone()
    if found is None:
        raise LedgerError(f"the ledger has no head for {chain}: it was edited; restore it from a backup")
    return tuple(found)


def append(connection: sqlite3.Connection, chain: str, rows: Sequence[Sequence[object]]) -> None:
    """Add rows, each with its packed clients first, and update the head; call it inside a ``transaction``."""
    number, last = head(connection, chain)
    linked = []
    for row in rows:
        number += size(row[0])
        last = link(last, (number, *row))
        linked.append((number, *row, last))
    marks = ", ".join("?" * (2 + len(COLUMNS[chain].split(", "))))
    connection.executemany(f"INSERT INTO {chain} (seq, {COLUMNS[chain]}, hash) VALUES ({marks})", linked)
    connection.execute("UPDATE head SET rows = ?, hash = ? WHERE chain = ?", (number, last, chain))


def check(connection: sqlite3.Connection, chain: str) -> None:
    """Read a whole chain; raises ``LedgerError`` for a row or a head that was changed."""
    number, last = 0, GENESIS
    rows = connection.execute(f"SELECT seq, {COLUMNS[chain]}, hash FROM {chain} ORDER BY seq")
    for position, (seq, *row, stored) in enumerate(rows, 1):
        last = link(last, (seq, *row))
        number += (count := size(row[0]))
        if stored != last or seq != number or not count:
            raise LedgerError(f"{chain} row {position} was edited, removed or moved; {EDITED}")
    if (number, last) != head(connection, chain):
        raise LedgerError(
            f"the rows of {chain}, for {number} clients, do not match the head: rows were added or removed at the end; "
            "restore the ledger from a backup"
        )


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value.hex()
    return [value.hex()] if isinstance(value, bytes) else value
