import hashlib
import sqlite3

import pytest

from fed_dpsat.accounting import chain, storage
from fed_dpsat.accounting.chain import LedgerError, link

ROWS = [(client, 3, 0, "poisson_gaussian", 1.0, 0.5, 4) for client in range(4)]


@pytest.fixture
def file():
    """Four charges, in a file without the triggers: what somebody with a SQLite shell can make of one."""
    connection = storage.open_memory()
    chain.append(connection, "charges", ROWS[:2])
    chain.append(connection, "charges", ROWS[2:])
    for trigger in ("charges_update", "charges_delete", "head_delete"):
        connection.execute(f"DROP TRIGGER {trigger}")
    yield connection
    connection.close()


def test_a_link_can_be_computed_by_hand():
    row = (1, 0, 3, 0, "poisson_gaussian", 1.0, 0.5, 4)
    text = b'[1,0,3,0,"poisson_gaussian","0x1.0000000000000p+0","0x1.0000000000000p-1",4]'
    assert link(bytes(32), row) == hashlib.sha256(bytes(32) + text).digest()


def test_links_tell_neighbouring_floats_apart():
    assert link(b"", (0.1,)) != link(b"", (0.1 + 2**-56,))


def test_what_was_appended_checks(file):
    chain.check(file, "charges")
    assert chain.head(file, "charges")[0] == 4
    chain.check(file, "outcomes")
    assert chain.head(file, "outcomes") == (0, chain.GENESIS)


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE charges SET steps = 3 WHERE seq = 2",
        "UPDATE charges SET noise_multiplier = 1.0000000000000002 WHERE seq = 4",
        "UPDATE charges SET client = 9 WHERE seq = 1",
        "UPDATE charges SET kind = x'00' WHERE seq = 3",
        "UPDATE charges SET hash = x'00' WHERE seq = 4",
        "DELETE FROM charges WHERE seq = 2",
        "DELETE FROM charges WHERE seq = 4",
        "DELETE FROM charges",
        "DELETE FROM charges WHERE seq = 1; UPDATE charges SET seq = seq - 1",
        "UPDATE charges SET seq = 0 WHERE seq = 1",
        "INSERT INTO charges SELECT 5, 7, 3, 0, kind, 1.0, 0.5, 4, hash FROM charges WHERE seq = 4",
        "UPDATE head SET rows = 3 WHERE chain = 'charges'",
        "UPDATE head SET hash = x'00' WHERE chain = 'charges'",
        "DELETE FROM head",
        "DELETE FROM charges WHERE seq = 4; UPDATE head SET rows = 3 WHERE chain = 'charges'",
    ],
)
def test_any_edit_is_found(file, edit):
    file.executescript(edit)
    with pytest.raises(LedgerError, match="restore"):
        chain.check(file, "charges")


def test_swapped_rows_are_found(file):
    file.executescript(
        "UPDATE charges SET seq = 100 WHERE seq = 2; UPDATE charges SET seq = 2 WHERE seq = 3;"
        "UPDATE charges SET seq = 3 WHERE seq = 100"
    )
    with pytest.raises(LedgerError, match="row 2"):
        chain.check(file, "charges")


def test_one_row_per_client_round_and_attempt(file):
    with pytest.raises(sqlite3.IntegrityError):
        chain.append(file, "charges", ROWS[:1])
