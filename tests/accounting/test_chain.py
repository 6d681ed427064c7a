import hashlib

import numpy as np
import pytest

from fed_dpsat.accounting import chain, storage
from fed_dpsat.accounting.chain import LedgerError, link
from fed_dpsat.accounting.packed import pack

ROWS = [(client, 3, 0, "poisson_gaussian", 1.0, 0.5, 4) for client in range(4)]
LISTS = [[0, 2, 5], [7, 8, 10], [1, 300]]


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


def test_a_link_of_a_packed_list_can_be_computed_by_hand():
    text = b'[3,["01010203"],3,0,"released"]'
    assert (
        link(bytes(32), (3, pack(np.array([0, 2, 5])), 3, 0, "released")) == hashlib.sha256(bytes(32) + text).digest()
    )


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


@pytest.fixture
def lists():
    """Three rows for 3, 3 and 2 clients, without the triggers."""
    connection = storage.open_memory()
    charges = [(pack(np.array(clients)), 3, 0, "poisson_gaussian", 1.0, 0.5, i) for i, clients in enumerate(LISTS, 1)]
    chain.append(connection, "charges", charges)
    connection.execute("DROP TRIGGER charges_update")
    connection.execute("DROP TRIGGER charges_delete")
    yield connection
    connection.close()


def test_the_head_counts_clients(lists):
    chain.check(lists, "charges")
    assert chain.head(lists, "charges")[0] == 8
    assert lists.execute("SELECT seq FROM charges").fetchall() == [(3,), (6,), (8,)]


@pytest.mark.parametrize(
    "edit",
    [
        f"UPDATE charges SET client = x'{pack(np.array([0, 2, 6])).hex()}' WHERE seq = 3",
        f"UPDATE charges SET client = x'{pack(np.array([0, 2])).hex()}' WHERE seq = 3",
        f"UPDATE charges SET client = x'{pack(np.array([0, 2, 5, 6])).hex()}' WHERE seq = 3",
        "CREATE TEMP TABLE t AS SELECT 9 - seq AS seq, client FROM charges WHERE seq < 8;"
        "UPDATE charges SET client = (SELECT client FROM t WHERE t.seq = charges.seq) WHERE seq < 8",
        "UPDATE charges SET client = hex(client) WHERE seq = 3",
        "UPDATE charges SET client = 5 WHERE seq = 3",
        "UPDATE charges SET steps = 9 WHERE seq = 6",
        "UPDATE charges SET seq = 7 WHERE seq = 6",
        "UPDATE charges SET seq = 9 WHERE seq = 8; UPDATE head SET rows = 9 WHERE chain = 'charges'",
        "DELETE FROM charges WHERE seq = 3",
        "DELETE FROM charges WHERE seq = 8",
        "UPDATE head SET rows = 3 WHERE chain = 'charges'",
    ],
)
def test_any_edit_of_packed_lists_is_found(lists, edit):
    lists.executescript(edit)
    with pytest.raises(LedgerError, match="restore"):
        chain.check(lists, "charges")


def test_clients_that_two_rows_exchange_are_found(lists):
    """Client 5 for client 7: both rows stay valid lists of three."""
    for seq, clients in ((3, [0, 2, 7]), (6, [5, 8, 10])):
        lists.execute("UPDATE charges SET client = ? WHERE seq = ?", (pack(np.array(clients)), seq))
    with pytest.raises(LedgerError, match="charges row 1 was edited"):
        chain.check(lists, "charges")


@pytest.mark.parametrize("stored", [b"\x03\x01\x01\x01", b"", "0101", -1, 1.0])
def test_a_row_without_clients_is_found_also_under_a_right_hash(lists, stored):
    """As somebody who rewrites all hashes could make it."""
    count, last = chain.head(lists, "charges")
    row = (count + 1, stored, 4, 0, "poisson_gaussian", 1.0, 0.5, 1)
    last = link(last, row)
    lists.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, last))
    lists.execute("UPDATE head SET rows = ?, hash = ? WHERE chain = 'charges'", (count + 1, last))
    with pytest.raises(LedgerError, match="charges row 4 was edited"):
        chain.check(lists, "charges")
