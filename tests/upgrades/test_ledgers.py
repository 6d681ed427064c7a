"""Ledgers of schema 1 (README.md), with one row per client: read as they are, and continued without a migration."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fed_dpsat.accounting import LedgerError, PrivacyEvent, PrivacyLedger
from fed_dpsat.accounting.ledger import Head

EVENT = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=3)
EPSILON = 2.146090760151527
"""As 0.2.0 computed it."""
HEADS = [
    Head(0, "00" * 32),
    Head(4, "82b55ee43267077183e0ebcfc80be637028da25cc50da84791808171315c5dc7"),
    Head(9, "b4bbea5b0a97ebcbe459f7b8a760b17f4217133fe2e1da5c556604c6f6a2d5a7"),
]
"""Of its calls, as 0.2.0 published them."""


@pytest.fixture
def path(tmp_path):
    return Path(shutil.copy(Path(__file__).parent / "ledgers" / "schema_1.sqlite", tmp_path))


def version(path):
    with closing(sqlite3.connect(path)) as file:
        return file.execute("PRAGMA user_version").fetchone()[0]


@pytest.mark.parametrize("readonly", [True, False])
def test_reading_changes_nothing(path, readonly):
    before = path.read_bytes()
    with PrivacyLedger(path, readonly=readonly) as ledger:
        ledger.verify()
        assert ledger.epsilon(1e-4) == pytest.approx(EPSILON, abs=1e-12)
        assert ledger.head == HEADS[-1]
        assert all(map(ledger.extends, HEADS))
    assert path.read_bytes() == before


def test_a_file_is_continued_with_its_heads(path):
    with PrivacyLedger(path) as ledger, PrivacyLedger(path, readonly=True) as reader:
        ledger.charge_many(1, 0, dict.fromkeys([1, 2, 4, 6], EVENT))  # 1 and 2 are charged
        ledger.charge_many(2, 0, [(range(1000), EVENT)])
        ledger.settle_many(2, 0, [(range(1000), "released")])
        assert reader.head == ledger.head
        assert reader.head.charges == 9 + 2 + 1000
        assert reader.epsilon(1e-4) == ledger.epsilon(1e-4) > EPSILON
        assert reader.outcomes(2, 0) == dict.fromkeys(range(1000), "released")
        reader.verify()
        assert all(map(reader.extends, [*HEADS, ledger.head]))
    assert version(path) == 2  # so 0.2.0 does not take it for its own
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("SELECT COUNT(*) FROM charges").fetchone()[0] == 9 + 1 + 1


def test_a_refused_charge_leaves_the_file_to_older_versions(path):
    before = path.read_bytes()
    with PrivacyLedger(path) as ledger, pytest.raises(LedgerError, match="client=1, round=0, attempt=0 is charged"):
        ledger.charge(1, 0, 0, EVENT)
    assert (version(path), path.read_bytes()) == (1, before)


@pytest.mark.parametrize("table", ["charges", "outcomes"])
@pytest.mark.parametrize("seq", [3, 13])
def test_an_edit_before_and_after_the_change_is_found(path, table, seq):
    with PrivacyLedger(path) as ledger:
        ledger.charge_many(2, 0, [(range(4), EVENT)])
        ledger.settle_many(2, 0, [(range(3), "released"), ([3], "dropped: late")])
    seq = min(seq, 9) if table == "outcomes" else seq
    with closing(sqlite3.connect(path)) as file:
        trigger = file.execute("SELECT sql FROM sqlite_master WHERE name = ?", (f"{table}_update",)).fetchone()[0]
        file.execute(f"DROP TRIGGER {table}_update")
        assert file.execute(f"UPDATE {table} SET attempt = attempt + 5 WHERE seq = ?", (seq,)).rowcount == 1
        file.execute(trigger)
        file.commit()
    with pytest.raises(LedgerError, match=f"{table} row . was edited|{table} row 10 was edited"):
        PrivacyLedger(path)
