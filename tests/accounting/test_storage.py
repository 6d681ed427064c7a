import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from fed_dpsat.accounting import chain, rows, storage
from fed_dpsat.accounting.chain import LedgerError
from fed_dpsat.accounting.packed import pack

ROWS = [(client, 3, 0, "poisson_gaussian", 1.0, 0.5, 4) for client in range(4)]


@pytest.fixture
def path(tmp_path):
    """A ledger with four charges."""
    path = tmp_path / "ledger.sqlite"
    connection = storage.open_file(path, readonly=False, must_exist=False)
    with storage.transaction(connection, path):
        chain.append(connection, "charges", ROWS)
    connection.close()
    return path


def open_and_verify(path, readonly=True):
    connection = storage.open_file(path, readonly=readonly, must_exist=True)
    try:
        storage.verify_file(connection)
    finally:
        connection.close()


def test_a_commit_is_on_disk_when_it_returns(path):
    connection = storage.open_file(path, readonly=False, must_exist=True)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
    connection.close()
    assert [file.name for file in path.parent.iterdir()] == ["ledger.sqlite"]


@pytest.mark.parametrize("table", ["charges", "outcomes"])
@pytest.mark.parametrize(
    "edit", ["UPDATE {} SET round = 0", "DELETE FROM {}", "INSERT OR REPLACE INTO {} SELECT * FROM {}"]
)
def test_rows_cannot_be_changed_through_sqlite(path, table, edit):
    connection = storage.open_file(path, readonly=False, must_exist=True)
    if table == "outcomes":
        chain.append(connection, table, [(0, 3, 0, "released")])
    with pytest.raises(sqlite3.IntegrityError, match=f"{table} are append-only"):
        connection.execute(edit.format(table, table))
    connection.close()
    open_and_verify(path)


def test_a_trigger_or_table_that_was_changed_is_found(path):
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER charges_delete")
    connection.close()
    with pytest.raises(LedgerError, match="triggers of the ledger were changed"):
        open_and_verify(path)


def test_a_half_written_transaction_is_none(path):
    connection = storage.open_file(path, readonly=False, must_exist=True)
    with pytest.raises(LedgerError, match="NOT NULL"), storage.transaction(connection, path):
        chain.append(connection, "charges", [(9, 3, 0, "poisson_gaussian", 1.0, 0.5, 4), (*ROWS[0][:-1], None)])
    assert chain.head(connection, "charges")[0] == 4
    connection.close()


@pytest.mark.parametrize("readonly", [False, True])
class TestWhatIsNoLedger:
    def refused(self, path, readonly, says):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(LedgerError, match=says):
            open_and_verify(path, readonly)
        assert before is None or path.read_bytes() == before

    def test_absent(self, tmp_path, readonly):
        self.refused(tmp_path / "none.sqlite", readonly, "no ledger at .* restore")
        assert not list(tmp_path.iterdir())

    def test_no_folder(self, tmp_path, readonly):
        self.refused(tmp_path / "none" / "ledger.sqlite", readonly, "no ledger")

    def test_a_folder(self, tmp_path, readonly):
        self.refused(tmp_path, readonly, "cannot open")

    def test_another_kind_of_file(self, tmp_path, readonly):
        path = tmp_path / "ledger.sqlite"
        path.write_text("client,round,epsilon\n" * 100)
        self.refused(path, readonly, "not a ledger")

    def test_another_database(self, tmp_path, readonly):
        path = tmp_path / "ledger.sqlite"
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE charges (client)")
        connection.close()
        self.refused(path, readonly, "not a ledger of fed_dpsat")

    def test_a_newer_version(self, path, readonly):
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 3")
        connection.close()
        self.refused(path, readonly, "schema 3, this fed_dpsat reads 1, 2; upgrade")

    @pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.99])
    def test_cut_off(self, path, readonly, share):
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        self.refused(path, readonly, "not a ledger|damaged")

    @pytest.mark.parametrize("pages", [1, 2, 5, 6])
    def test_cut_off_between_pages(self, path, readonly, pages):
        assert path.stat().st_size == 7 * 4096
        path.write_bytes(path.read_bytes()[: pages * 4096])
        self.refused(path, readonly, "damaged")

    @pytest.mark.parametrize("page", [1, 2, 3, 4])
    def test_overwritten(self, path, readonly, page):
        content = bytearray(path.read_bytes())
        content[4096 * page : 4096 * (page + 1)] = b"\xa5" * 4096
        path.write_bytes(content)
        self.refused(path, readonly, "damaged|edited|changed|head")


def test_a_full_disk_is_told_and_nothing_is_charged(path):
    connection = storage.open_file(path, readonly=False, must_exist=True)
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LedgerError, match="disk is full"), storage.transaction(connection, path):
        chain.append(connection, "charges", [(c, 4, 0, "poisson_gaussian", 1.0, 0.5, 4) for c in range(1000)])
    storage.verify_file(connection)
    assert chain.head(connection, "charges")[0] == 4
    connection.close()


HOLD = """
import sys, time
from pathlib import Path
from fed_dpsat.accounting import storage
with storage.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_ends_with_its_process(path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LedgerError, match="another process"), storage.lock(path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with storage.lock(path):
        pass


def test_the_lock_holds_within_a_process(path):
    with storage.lock(path):
        with pytest.raises(LedgerError, match="readonly=True"), storage.lock(path):
            pass
        with pytest.raises(LedgerError), storage.lock(path):  # a refused try does not drop the first's lock
            pass


def test_a_reader_undoes_what_a_killed_writer_left_half_done(path, tmp_path):
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA cache_size = 1")  # pages go to the file before the commit
    writer.execute("BEGIN IMMEDIATE")
    chain.append(writer, "charges", [(c, 4, 0, "poisson_gaussian", 1.0, 0.5, 4) for c in range(1000)])
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("ledger.sqlite", "ledger.sqlite-journal"):
        shutil.copy(tmp_path / name, killed / name)
    writer.execute("ROLLBACK")
    writer.close()
    assert (killed / "ledger.sqlite").read_bytes() != path.read_bytes()
    open_and_verify(killed / "ledger.sqlite")
    connection = storage.open_file(killed / "ledger.sqlite", readonly=True, must_exist=True)
    assert chain.head(connection, "charges")[0] == 4
    connection.close()


def test_a_ledger_is_created_whole(tmp_path):
    (tmp_path / "ledger.sqlite.new").write_text("left by a run that was killed here")
    storage.open_file(tmp_path / "ledger.sqlite", readonly=False, must_exist=False).close()
    open_and_verify(tmp_path / "ledger.sqlite")
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.sqlite"]


def test_histories_are_merged_over_single_clients_and_lists(path, event):
    connection = storage.open_file(path, readonly=False, must_exist=True)
    charges = [
        (pack(np.array([0, 2])), 4, 0, "poisson_gaussian", 1.0, 0.5, 6),
        (0, 5, 0, "poisson_gaussian", 2.0, 0.5, 1),
    ]
    chain.append(connection, "charges", charges)
    found = rows.read_histories(connection).all().to_dict()
    before = rows.read_histories(connection, before=4).all().to_dict()
    connection.close()
    assert found[0] == (event(1.0, 0.5, 10), event(2.0, 0.5, 1))
    assert found[2] == (event(1.0, 0.5, 10),)
    assert found[1] == (event(1.0, 0.5, 4),)
    assert found[1] is found[3]
    assert before == dict.fromkeys(range(4), (event(1.0, 0.5, 4),))


def test_a_charge_that_is_none_is_named(path):
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER charges_update")
    connection.execute("UPDATE charges SET sample_rate = 2 WHERE client = 1")
    with pytest.raises(LedgerError, match=r"round 3, attempt 0 is invalid .*sample_rate=2\.0"):
        rows.read_histories(connection)
    connection.close()


@pytest.mark.parametrize("again", [[0], [0, 9]])
@pytest.mark.parametrize("table", ["charges", "outcomes"])
def test_a_client_occurs_once_for_a_round_and_an_attempt(path, table, again):
    """The writer sees to it, and the file is checked, also if somebody made the chain anew."""
    columns = {"charges": ("poisson_gaussian", 1.0, 0.5, 5), "outcomes": ("released",)}[table]
    connection = storage.open_file(path, readonly=False, must_exist=True)
    chain.append(connection, table, [(pack(np.array([0, 4])), 8, 0, *columns), (0, 8, 1, *columns)])
    storage.verify_file(connection)
    chain.append(connection, table, [(pack(np.array(again)), 8, 0, *columns)])
    with pytest.raises(LedgerError, match=f"{table} of round 8, attempt 0: client=0 occurs twice"):
        storage.verify_file(connection)
    connection.close()


def test_a_list_that_does_not_ascend_is_found_also_under_a_right_hash(path):
    connection = storage.open_file(path, readonly=False, must_exist=True)
    chain.append(connection, "charges", [(b"\x01\x01\x00", 8, 0, "poisson_gaussian", 1.0, 0.5, 4)])
    for read in (storage.verify_file, rows.read_histories):
        with pytest.raises(LedgerError, match=r"charges of round 8, attempt 0: .* not two or more in ascending order"):
            read(connection)
    connection.close()
