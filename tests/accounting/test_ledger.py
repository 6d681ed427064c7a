import json
import math
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpsat.accounting import rows
from fed_dpsat.accounting.accountant import epsilon
from fed_dpsat.accounting.chain import LedgerError
from fed_dpsat.accounting.event import PrivacyEvent, merge
from fed_dpsat.accounting.histories import Histories
from fed_dpsat.accounting.ledger import PrivacyLedger


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def test_charges_survive_the_process(path, event):
    with PrivacyLedger(path) as ledger:
        ledger.charge(0, 1, 0, event(1.0, 0.1, 5))
        ledger.charge_many(2, 0, {0: event(1.0, 0.1, 5), 7: event(2.0, 0.1, 5)})
        open_histories, open_head = ledger.histories(), ledger.head
    for readonly in (True, False):
        with PrivacyLedger(path, readonly=readonly, must_exist=True) as ledger:
            assert ledger.histories() == open_histories == {0: (event(1.0, 0.1, 10),), 7: (event(2.0, 0.1, 5),)}
            assert ledger.head == open_head
            assert ledger.head.charges == 3
            assert ledger.history(0) == (event(1.0, 0.1, 10),)
            assert ledger.history(1) == ()
            assert ledger.rounds_by_client() == {0: 2, 7: 1}


def test_epsilon_is_the_maximum_over_clients(event):
    with PrivacyLedger(":memory:") as ledger:
        assert ledger.epsilon(1e-5) == 0.0
        assert ledger.epsilon_by_client(1e-5) == {}
        ledger.charge_many(1, 0, {0: event(1.0, 0.05, 20), 1: event(1.0, 0.1, 20), 2: event(1.0, 0.05, 20)})
        by_client = ledger.epsilon_by_client(1e-5)
        assert by_client[0] == by_client[2] == epsilon([event(1.0, 0.05, 20)], 1e-5)
        assert ledger.epsilon(1e-5) == by_client[1] == epsilon([event(1.0, 0.1, 20)], 1e-5)
        assert ledger.epsilon(1e-5, "rdp") == epsilon([event(1.0, 0.1, 20)], 1e-5, "rdp") > ledger.epsilon(1e-5)


def test_epsilon_accumulates_over_rounds(event):
    with PrivacyLedger(":memory:") as ledger:
        spent = []
        for round in range(1, 4):
            ledger.charge_many(round, 0, dict.fromkeys(range(10), event(1.0, 0.008, 125)))
            spent.append(ledger.epsilon(1e-5))
    assert spent == [epsilon([event(1.0, 0.008, 125 * rounds)], 1e-5) for rounds in (1, 2, 3)]
    assert spent[2] == pytest.approx(0.926, abs=5e-4)  # METHODS, mistake 2: not 0.614 again


def test_a_client_without_noise_is_not_private(event):
    with PrivacyLedger(":memory:") as ledger:
        ledger.charge(0, 1, 0, event(1.0, 0.1, 5))
        ledger.charge(1, 1, 0, event(0.0, 0.1, 5))
        assert ledger.epsilon(1e-5) == math.inf
        assert ledger.epsilon_by_client(1e-5)[0] < 3


def test_charging_again_is_free_and_a_retry_is_not(path, event):
    with PrivacyLedger(path) as ledger:
        ledger.charge(3, 1, 0, event())
        head = ledger.head
        ledger.charge(3, 1, 0, event())
        ledger.charge_many(1, 0, {3: event()})
        assert ledger.head == head
        ledger.charge_many(1, 0, {3: event(), 4: event()})  # a cohort of which a part was charged before a crash
        assert ledger.histories() == {3: (event(),), 4: (event(),)}
        ledger.charge(3, 1, 1, event())
        assert ledger.history(3) == merge([event(), event()])
        assert ledger.rounds_by_client() == {3: 1, 4: 1}


def test_a_key_stands_for_one_event_and_a_cohort_is_charged_whole(path, event):
    with PrivacyLedger(path) as ledger:
        ledger.charge(3, 1, 0, event(steps=10))
        with pytest.raises(LedgerError, match=r"client=3, round=1, attempt=0 is charged already.*new attempt"):
            ledger.charge_many(1, 0, {2: event(steps=10), 3: event(steps=11), 4: event(steps=10)})
        assert ledger.histories() == {3: (event(steps=10),)}
        ledger.verify()
    with PrivacyLedger(path, readonly=True) as ledger:
        assert ledger.histories() == {3: (event(steps=10),)}


@pytest.mark.parametrize(
    "key", [(-1, 1, 0), (0, -1, 0), (0, 1, -1), (2**63, 1, 0), (True, 1, 0), ("0", 1, 0), (0, 1.0, 0)]
)
def test_clients_rounds_and_attempts_are_numbers(event, key):
    with PrivacyLedger(":memory:") as ledger, pytest.raises(LedgerError, match="is not an int"):
        ledger.charge(*key, event())


def test_an_outcome_never_lowers_a_charge(path, event):
    with PrivacyLedger(path) as ledger:
        ledger.charge_many(1, 0, {0: event(), 1: event(), 2: event()})
        before = ledger.epsilon(1e-5), ledger.histories(), ledger.head
        ledger.settle(0, 1, 0, "released")
        ledger.settle(0, 1, 0, "released")
        ledger.settle_many(1, 0, {1: "dropped: reply without an event", 2: "failed: timeout"})
        assert (ledger.epsilon(1e-5), ledger.histories(), ledger.head) == before
        ledger.verify()
    written = sqlite3.connect(path).execute("SELECT client, outcome FROM outcomes").fetchall()
    assert written == [(0, "released"), (1, "dropped: reply without an event"), (2, "failed: timeout")]


def test_what_was_not_charged_cannot_be_settled(event):
    with PrivacyLedger(":memory:") as ledger:
        ledger.charge(0, 1, 0, event())
        with pytest.raises(LedgerError, match="client=1, round=1, attempt=0 has no charge"):
            ledger.settle(1, 1, 0, "released")
        with pytest.raises(LedgerError, match="has no charge"):
            ledger.settle(0, 1, 1, "released")
        ledger.settle(0, 1, 0, "failed: timeout")
        with pytest.raises(LedgerError, match="settled already, as 'failed: timeout', not 'released'"):
            ledger.settle(0, 1, 0, "released")
        with pytest.raises(LedgerError, match="not a text"):
            ledger.settle(0, 1, 0, "")


def test_a_cohort_is_one_row_of_pairs_or_of_a_mapping(path, tmp_path, event):
    """Both forms make the same file."""
    clients = np.array([9, 2, 4, 300])
    with PrivacyLedger(path) as ledger, PrivacyLedger(tmp_path / "other.sqlite") as other:
        ledger.charge_many(1, 0, [(clients, event()), ([7], event(steps=1)), (range(2), event())])
        other.charge_many(1, 0, {c: event(steps=1) if c == 7 else event() for c in (7, 0, 300, 1, 9, 4, 2)})
        ledger.settle_many(1, 0, [([0, 1], "released"), (clients, "dropped: late"), ([7], "released")])
        other.settle_many(1, 0, dict.fromkeys([9, 2, 4, 300], "dropped: late") | dict.fromkeys([0, 1, 7], "released"))
        assert ledger.head == other.head
        assert ledger.head.charges == 7
        assert ledger.histories() == other.histories()
        assert ledger.outcomes(1, 0) == other.outcomes(1, 0)
        assert ledger.outcome(300, 1, 0) == "dropped: late"
    with closing(sqlite3.connect(path)) as file:
        written = file.execute("SELECT seq, client, steps FROM charges").fetchall()
        assert written == [(6, bytes.fromhex("02 0100 0100 0100 0200 0500 2301"), 10), (7, 7, 1)]
        assert file.execute("SELECT hash FROM outcomes").fetchall() == (
            sqlite3.connect(tmp_path / "other.sqlite").execute("SELECT hash FROM outcomes").fetchall()
        )


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([([1, 2], 0), ([2], 1)], "client=2 occurs twice"),
        ([([1, 1], 0)], "client=1 occurs twice"),
        ([([1.0], 0)], "client=1.0 is not an int"),
        ([(np.array([1.5]), 0)], "client=1.5 is not an int"),
        ([(np.array([-1]), 0)], "client=-1 is not an int"),
        ([([2**63], 0)], "client=9223372036854775808 is not an int"),
    ],
)
def test_pairs_name_each_client_once(event, pairs, says):
    with PrivacyLedger(":memory:") as ledger:
        ledger.charge(0, 1, 0, event())
        with pytest.raises(LedgerError, match=says):
            ledger.charge_many(1, 0, [(clients, event(steps=1 + steps)) for clients, steps in pairs])
        with pytest.raises(LedgerError, match=says):
            ledger.settle_many(1, 0, [(clients, "released") for clients, _ in pairs])
        assert ledger.head.charges == 1


def test_histories_of_some_clients(event):
    with PrivacyLedger(":memory:") as ledger:
        ledger.charge_many(1, 0, [(range(5), event())])
        ledger.charge_many(2, 0, [([4, 7], event())])
        found = ledger.histories_of([9, 4, 0])
        assert found.to_dict() == {0: (event(),), 4: merge([event()] * 2), 9: ()}
        assert ledger.histories_of(np.array([7, 4]), before=2).to_dict() == {4: (event(),), 7: ()}
        ledger.charge_many(3, 0, [(range(10), event())])  # nobody has the old ones any more
        ledger.charge_many(4, 0, [(range(10), event(steps=1))])
        assert found.to_dict() == {0: (event(),), 4: merge([event()] * 2), 9: ()}


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 5), st.integers(0, 1), st.sampled_from([0.8, 1.0]), st.integers(1, 9)
        ),
        max_size=25,
    )
)
def test_counting_as_charges_come_is_counting_the_file(charges):
    with PrivacyLedger(":memory:") as ledger:
        expected: dict[int, list[PrivacyEvent]] = {}
        taken = set()
        for client, round, attempt, noise, steps in charges:
            event = PrivacyEvent(noise_multiplier=noise, sample_rate=0.1, steps=steps)
            if (client, round, attempt) not in taken:
                taken.add((client, round, attempt))
                ledger.charge(client, round, attempt, event)
                expected.setdefault(client, []).append(event)
        assert ledger.histories() == {client: merge(events) for client, events in expected.items()}
        assert rows.read_histories(ledger._file).all().to_dict() == ledger.histories()
        assert set(ledger._histories.distinct()) == set(ledger.histories().values())
        ledger.verify()


def test_one_writer_and_any_readers(path, event):
    with PrivacyLedger(path) as writer:
        writer.charge(0, 1, 0, event())
        with pytest.raises(LedgerError, match="another process"):
            PrivacyLedger(path)
        with PrivacyLedger(path, readonly=True) as reader:
            assert reader.histories() == {0: (event(),)}
            writer.charge(0, 2, 0, event())
            writer.charge(1, 2, 0, event())
            assert reader.histories() == writer.histories() == {0: merge([event(), event()]), 1: (event(),)}
            assert reader.epsilon(1e-5) == writer.epsilon(1e-5)
            reader.verify()
            for write in (lambda: reader.charge(5, 1, 0, event()), lambda: reader.settle(0, 1, 0, "released")):
                with pytest.raises(LedgerError, match="readonly"):
                    write()
    with PrivacyLedger(path) as next_writer:
        next_writer.charge(5, 1, 0, event())


def test_two_writers_that_evade_the_lock_do_not_share_a_charge(path, event):
    with PrivacyLedger(path) as writer:
        writer.charge(0, 1, 0, event())
        (path.parent / "ledger.sqlite.lock").unlink()
        with PrivacyLedger(path) as other:
            other.charge(0, 2, 0, event())
        with pytest.raises(LedgerError, match="another process wrote"):
            writer.charge(0, 2, 0, event())  # equal, and yet another release
        assert writer.history(0) == merge([event(), event()])


def test_an_interrupt_after_the_commit_does_not_lower_epsilon(path, event, monkeypatch):
    with PrivacyLedger(path) as ledger:
        ledger.charge(0, 1, 0, event())

        def interrupted(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Histories, "charge", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ledger.charge(0, 2, 0, event())
        assert ledger.history(0) == merge([event(), event()])
        ledger.charge(0, 3, 0, event())
        assert ledger.epsilon(1e-5) == epsilon([event()] * 3, 1e-5)


def test_a_resumed_run_needs_its_ledger(path):
    with pytest.raises(LedgerError, match="no ledger"):
        PrivacyLedger(path, must_exist=True)
    with pytest.raises(LedgerError, match="no ledger"):
        PrivacyLedger(path, readonly=True)
    PrivacyLedger(path).close()
    PrivacyLedger(path, must_exist=True).close()


def test_an_edited_ledger_is_not_written_on(path, event):
    with PrivacyLedger(path) as ledger:
        ledger.charge_many(1, 0, {0: event(steps=10), 1: event(steps=11)})
    connection = sqlite3.connect(path)
    trigger = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'charges_update'").fetchone()[0]
    connection.execute("DROP TRIGGER charges_update")
    connection.execute("UPDATE charges SET steps = 1 WHERE client = 1")
    connection.execute(trigger)
    connection.commit()
    connection.close()
    with pytest.raises(LedgerError, match="charges row 2 was edited"):
        PrivacyLedger(path)
    with PrivacyLedger(path, readonly=True) as ledger, pytest.raises(LedgerError, match="charges row 2 was edited"):
        ledger.verify()


def test_a_full_disk_charges_nobody(path, event):
    with PrivacyLedger(path) as ledger:
        ledger.charge(0, 1, 0, event())
        head = ledger.head
        pages = ledger._file.execute("PRAGMA page_count").fetchone()[0]
        ledger._file.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match="disk is full"):
            ledger.charge_many(2, 0, dict.fromkeys(range(20000), event()))
        assert ledger.histories() == {0: (event(),)}
        assert ledger.head == head
        ledger._file.execute("PRAGMA max_page_count = 100000")  # space was freed
        ledger.charge_many(2, 0, dict.fromkeys(range(20000), event()))
        ledger.verify()
    with PrivacyLedger(path) as ledger:
        assert len(ledger.histories()) == 20000


def test_a_closed_ledger_says_so(path, event):
    ledger = PrivacyLedger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.charge(0, 1, 0, event())


RELEASE = """
import itertools, json, os, sys
from fed_dpsat.accounting import PrivacyEvent, PrivacyLedger

path, released, attempt = sys.argv[1], sys.argv[2], int(sys.argv[3])
event = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=3)
with PrivacyLedger(path) as ledger, open(released, "a") as out:
    print("ready", flush=True)
    for round in itertools.count():
        cohort = [round % 5, 5, 6, 7]
        ledger.charge_many(round, attempt, dict.fromkeys(cohort, event))
        for client in cohort:
            out.write(json.dumps([client, round, attempt]) + "\\n")
        out.flush()
        os.fsync(out.fileno())
        ledger.settle(5, round, attempt, "released")
"""


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_never_leaves_a_release_that_is_not_charged(path, tmp_path, kills):
    """A real process, killed at random moments while it charges and releases."""
    released, draw = tmp_path / "released", random.Random(0)
    for attempt in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", RELEASE, path, released, str(attempt)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert child.stdout.readline() == "ready\n"  # the ledger that the last kill left opens and verifies
            time.sleep(draw.uniform(0, 0.06))
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        with PrivacyLedger(path, readonly=True) as ledger:
            ledger.verify()
    with closing(sqlite3.connect(path)) as file:
        charged = {(c, r, a) for r, a, cohort in rows.cohorts(file, "charges") for c in cohort.clients.tolist()}
    whole = [line for line in released.read_text().splitlines(keepends=True) if line.endswith("]\n")]
    keys = {tuple(json.loads(line)) for line in whole}
    assert keys <= charged
    assert len(keys) > kills  # else nothing was put to the test
    assert len(charged) - len(keys) <= 4 * kills  # at most the cohort that each kill interrupted
    assert len(charged) % 4 == 0  # no half cohort
    with PrivacyLedger(path) as ledger:
        ledger.verify()
        assert ledger.history(5)[0].steps == 3 * len(charged) // 4
