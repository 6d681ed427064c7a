"""The file of the ledger: a durable, append-only SQLite file with one writer.

Durability: ``journal_mode=DELETE`` with ``synchronous=EXTRA``. FULL is not enough in this mode: after a power loss, an
unsynced directory can restore the journal of a committed transaction, which undoes the transaction. WAL with FULL is
durable too and saves half a millisecond per commit. But WAL keeps charges in a second file, which a copy of
``ledger.sqlite`` misses, and a read-only folder cannot serve it.

One writer: a writer holds an exclusive lock on the empty file ``<path>.lock`` while it is open. The operating system
ends the lock with the process, also after kill -9. Readers need no lock.

Rows: in schema 2 there is one row per distinct event (or outcome) of a call, and its column ``client`` has all clients
that share it (``packed``). In schema 1 each row has one client. Such a row means the same in both, with the same hash.
So a file of schema 1 needs no migration: it keeps its tables, rows and hashes, and ``extends`` still finds its heads.
The first write raises only the number of its schema, in the same transaction, and older versions then refuse the file.
In schema 1 SQLite kept (client, round, attempt) unique; now the writer does, and each read and ``verify`` check it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fed_dpsat.accounting import chain
from fed_dpsat.accounting.chain import LedgerError
from fed_dpsat.accounting.rows import cohorts

APPLICATION_ID = 0x46445053  # "FDPS"
SCHEMA_VERSION = 2
BUSY_SECONDS = 60.0
_TABLES = """
CREATE TABLE head (chain TEXT PRIMARY KEY, rows INTEGER NOT NULL, hash BLOB NOT NULL);
CREATE TABLE charges (
    seq INTEGER PRIMARY KEY, {client} NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
    kind TEXT NOT NULL, noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL,
    hash BLOB NOT NULL{unique});
CREATE TABLE outcomes (
    seq INTEGER PRIMARY KEY, {client} NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
    outcome TEXT NOT NULL, hash BLOB NOT NULL{unique});
"""
_SCHEMAS = {
    1: _TABLES.format(client="client INTEGER", unique=", UNIQUE (round, attempt, client)"),
    2: _TABLES.format(client="client", unique="")
    + "CREATE INDEX charges_round ON charges (round, attempt);"
    + "CREATE INDEX outcomes_round ON outcomes (round, attempt);",
}
_TRIGGERS = """
CREATE TRIGGER charges_update BEFORE UPDATE ON charges
    BEGIN SELECT RAISE(ABORT, 'charges are append-only'); END;
CREATE TRIGGER charges_delete BEFORE DELETE ON charges
    BEGIN SELECT RAISE(ABORT, 'charges are append-only'); END;
CREATE TRIGGER outcomes_update BEFORE UPDATE ON outcomes
    BEGIN SELECT RAISE(ABORT, 'outcomes are append-only'); END;
CREATE TRIGGER outcomes_delete BEFORE DELETE ON outcomes
    BEGIN SELECT RAISE(ABORT, 'outcomes are append-only'); END;
CREATE TRIGGER head_delete BEFORE DELETE ON head BEGIN SELECT RAISE(ABORT, 'the head stays'); END;
"""


@contextmanager
def explained(path: Path | str, doing: str) -> Iterator[None]:
    """Turn an error of SQLite into a ``LedgerError`` that names the file and a remedy."""
    remedies = {
        sqlite3.SQLITE_FULL: "the disk is full; free space and resume: this call charged nothing",
        sqlite3.SQLITE_BUSY: "another process writes to it; wait for its end, or read with readonly=True",
        sqlite3.SQLITE_NOTADB: "it is not a ledger; give another path, or restore it from a backup",
        sqlite3.SQLITE_CORRUPT: "the file is damaged; restore it from a backup: its epsilon cannot be trusted",
        sqlite3.SQLITE_READONLY: "it is read-only here; make the folder writable",
        sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the path and its permissions",
    }
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        remedy = remedies.get(code, "no charge was made, so release nothing; the reason follows")
        raise LedgerError(f"cannot {doing} ledger {path}: {remedy} ({error})") from error


def open_file(path: Path, *, readonly: bool, must_exist: bool) -> sqlite3.Connection:
    """A connection to a checked ledger; a missing file is created atomically."""
    with explained(path, "open"):
        if not path.exists():
            if readonly or must_exist:
                raise LedgerError(
                    f"no ledger at {path}; without it the spent epsilon is unknown: restore it, or start a new run"
                )
            _create(path)
        connection = _connect(path, "ro" if readonly else "rw")
        try:
            _check_header(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def open_memory(version: int = SCHEMA_VERSION) -> sqlite3.Connection:
    """A ledger in memory, for tests."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    _write_schema(connection, version)
    return connection


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Exclude other writers of ``path``, in this process and in others."""
    side = path.with_name(path.name + ".lock")
    with explained(path, "lock"):
        holder = sqlite3.connect(side, isolation_level=None, timeout=0)
    try:
        with explained(path, "write to"):
            holder.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        holder.close()


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path | str) -> Iterator[None]:
    """Commit the block to disk at its end; roll it back if it raises."""
    with explained(path, "write to"):
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """All reads of the block see one state of the file, also while a writer commits."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def verify_file(connection: sqlite3.Connection) -> None:
    """Read the whole file; raises ``LedgerError`` at the first row, head, table or trigger that was changed."""
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise LedgerError(f"the file of the ledger is damaged ({damage}); restore it from a backup")
    found = _schema(connection)
    if not any(found == _schema_of(version) for version in _SCHEMAS):
        raise LedgerError("the tables or triggers of the ledger were changed; restore it from a backup")
    for name in chain.COLUMNS:
        chain.check(connection, name)
        for _ in cohorts(connection, name):
            pass


def raise_version(connection: sqlite3.Connection) -> None:
    """Mark a file of an older schema as one of this version; call it inside a ``transaction``."""
    if connection.execute("PRAGMA user_version").fetchone()[0] < SCHEMA_VERSION:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=BUSY_SECONDS
    )
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError as error:
        connection.close()
        if mode == "ro" and error.sqlite_errorcode == sqlite3.SQLITE_READONLY_ROLLBACK:
            # A writer was killed inside a transaction: only a connection that may write can roll it back.
            _connect(path, "rw").close()
            return _connect(path, mode)
        raise
    except BaseException:
        connection.close()
        raise
    if mode == "rw":
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA synchronous = EXTRA")
        connection.execute("PRAGMA recursive_triggers = ON")  # otherwise INSERT OR REPLACE deletes without a trigger
    return connection


def _check_header(connection: sqlite3.Connection, path: Path) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise LedgerError(
            f"{path} is not a ledger of fed_dpsat, or was cut off; give another path, or restore it from a backup"
        )
    if version not in _SCHEMAS:
        raise LedgerError(
            f"{path} has schema {version}, this fed_dpsat reads {', '.join(map(str, _SCHEMAS))}; upgrade fed_dpsat"
        )
    if path.stat().st_size % connection.execute("PRAGMA page_size").fetchone()[0]:
        raise LedgerError(f"{path} is damaged: it ends inside a page; restore it from a backup")


def _create(path: Path) -> None:
    """Write under another name, then rename: a ledger at ``path`` is complete, so an empty file is damaged."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    connection = sqlite3.connect(new, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = EXTRA")
        _write_schema(connection, SCHEMA_VERSION)
    finally:
        connection.close()
    new.replace(path)  # the first charge brings the name to disk at the latest: EXTRA syncs the folder


def _write_schema(connection: sqlite3.Connection, version: int) -> None:
    connection.executescript(
        f"BEGIN; {_SCHEMAS[version]} {_TRIGGERS} PRAGMA application_id = {APPLICATION_ID};"
        f"PRAGMA user_version = {version}; COMMIT;"
    )
    connection.executemany("INSERT INTO head VALUES (?, 0, ?)", [(name, chain.GENESIS) for name in chain.COLUMNS])


def _schema(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    return connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()


def _schema_of(version: int) -> list[tuple[str, ...]]:
    with closing(open_memory(version)) as model:
        return _schema(model)
