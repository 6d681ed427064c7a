"""The table in ``release``: what is charged, what is given again, what is refused; also where two processes ask."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import time

import pytest

from fed_dpsat.accounting import LedgerError, PrivacyEvent, PrivacyLedger, epsilon
from fed_dpsat.device.journal import Refusal, Request
from fed_dpsat.device.release import CLIENT, journal_path, ledger_path, prepare, release
from fed_dpsat.errors import SettingError

EVENT = PrivacyEvent(noise_multiplier=5.0, sample_rate=1.0, steps=1)
DELTA = 1e-5
ROUNDS = 4
BUDGET = epsilon([EVENT] * ROUNDS, DELTA)


def asked(round: int, *, run: str = "1", attempt: int = 0, content: str = "", settings: bytes = b"s") -> Request:
    digest = hashlib.sha256(f"{round} {content}".encode()).digest()
    return Request(run=run, round=round, attempt=attempt, settings=settings, digest=digest)


class Desk:
    """A folder, and fresh answers that say what state they were made from."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.count = itertools.count(1)
        prepare(folder)

    def ask(self, request: Request, *, event=EVENT, budget=BUDGET, fail: Exception | None = None) -> bytes:
        def compute(state):
            if fail:
                raise fail
            number = next(self.count)
            return f"reply {number} from {(state or b'nothing').decode()}".encode(), f"state {number}".encode()

        return release(self.folder, request, event, epsilon=budget, delta=DELTA, compute=compute)

    def charges(self) -> int:
        with PrivacyLedger(ledger_path(self.folder), readonly=True) as ledger:
            ledger.verify()
            return ledger.head.charges


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path / "device")


def test_each_new_question_is_charged_and_the_state_goes_on(desk):
    assert desk.ask(asked(1)) == b"reply 1 from nothing"
    assert desk.ask(asked(2)) == b"reply 2 from state 1"
    assert desk.ask(asked(2, attempt=1)) == b"reply 3 from state 2"
    assert desk.charges() == 3


def test_the_same_question_again_has_the_same_answer_for_one_charge(desk):
    assert desk.ask(asked(1)) == desk.ask(asked(1)) == b"reply 1 from nothing"
    assert desk.charges() == 1


def test_what_is_no_longer_kept_is_refused(desk):
    desk.ask(asked(1))
    desk.ask(asked(2))
    with pytest.raises(Refusal, match="no longer stored; send a new attempt"):
        desk.ask(asked(1))
    assert desk.charges() == 2


def test_the_same_round_with_other_content_is_refused(desk):
    desk.ask(asked(1))
    with pytest.raises(Refusal, match="had other content before"):
        desk.ask(asked(1, content="other weights"))
    assert desk.charges() == 1


def test_other_settings_under_the_same_run_are_refused(desk):
    desk.ask(asked(1))
    with pytest.raises(Refusal, match="other settings than at its start"):
        desk.ask(asked(2, settings=b"t"))
    assert desk.charges() == 1


def test_a_charge_whose_answer_failed_pays_for_the_next_try(desk):
    with pytest.raises(ZeroDivisionError):
        desk.ask(asked(1), fail=ZeroDivisionError())
    assert desk.charges() == 1
    assert desk.ask(asked(1)) == b"reply 1 from nothing"
    assert desk.charges() == 1


def test_a_new_run_shares_the_budget_and_begins_with_no_state(desk):
    desk.ask(asked(1))
    assert desk.ask(asked(1, run="2")) == b"reply 2 from nothing"
    assert desk.charges() == 2


def test_a_run_that_resumes_another_goes_on_from_its_state(desk):
    desk.ask(asked(1))
    assert desk.ask(asked(2, run="2")) == b"reply 2 from state 1"
    assert desk.ask(asked(3, run="3", settings=b"t")) == b"reply 3 from nothing"


def test_the_budget_is_never_exceeded(desk):
    for round in range(1, ROUNDS + 1):
        desk.ask(asked(round))
    for run in ("1", "2"):
        with pytest.raises(Refusal, match="refused, nothing was computed"):
            desk.ask(asked(ROUNDS + 1, run=run))
    assert desk.charges() == ROUNDS
    assert desk.ask(asked(ROUNDS)) == f"reply {ROUNDS} from state {ROUNDS - 1}".encode()  # it was paid for


def test_a_question_noted_but_not_charged_is_checked_against_what_is_left_now(desk, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PrivacyLedger, "charge", killed)
        with pytest.raises(KeyboardInterrupt):
            desk.ask(asked(1))
    for round in range(2, ROUNDS + 2):
        desk.ask(asked(round))
    with pytest.raises(Refusal, match="refused"):
        desk.ask(asked(1))
    assert desk.charges() == ROUNDS


def test_a_lost_ledger_is_not_begun_again(desk):
    desk.ask(asked(1))
    ledger_path(desk.folder).unlink()
    with pytest.raises(LedgerError, match="restore it"):
        desk.ask(asked(2))


def test_a_lost_journal_loses_answers_and_no_charge(desk):
    for round in range(1, 3):
        desk.ask(asked(round))
    journal_path(desk.folder).unlink()
    assert desk.ask(asked(1)) == b"reply 3 from nothing"
    assert desk.charges() == 3


def test_a_journal_put_back_from_a_backup_makes_no_second_answer_for_one_charge(desk):
    with pytest.raises(ZeroDivisionError):
        desk.ask(asked(1), fail=ZeroDivisionError())
    backup = journal_path(desk.folder).read_bytes()
    desk.ask(asked(1))
    journal_path(desk.folder).write_bytes(backup)
    with pytest.raises(Refusal, match="no longer stored"):
        desk.ask(asked(1))


def test_a_device_is_prepared_once(desk):
    with pytest.raises(SettingError, match="run init once"):
        prepare(desk.folder)
    file = desk.folder / "ledger.sqlite"
    with pytest.raises(SettingError, match=r"folder=.*below' is not a folder that can be created .*choose another"):
        prepare(file / "below")


def test_a_clock_set_back_changes_nothing(desk, monkeypatch):
    desk.ask(asked(1))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert desk.ask(asked(1)) == b"reply 1 from nothing"
    assert desk.ask(asked(2)) == b"reply 2 from state 1"
    assert desk.charges() == 2


RACE = """
import os, sys
from pathlib import Path
from fed_dpsat.device.journal import Refusal, Request
from fed_dpsat.device.release import release
from fed_dpsat.accounting import LedgerError, PrivacyEvent
folder, budget, me = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
event = PrivacyEvent(noise_multiplier=5.0, sample_rate=1.0, steps=1)
print("ready", flush=True)
sys.stdin.readline()
answered = 0
for round in range(1, 400):
    # both ask for the shared rounds, one of them twice as many of its own
    request = Request(run="1", round=round, attempt=0 if round % 2 else me, settings=b"s", digest=bytes([round % 251]))
    try:
        reply = release(folder, request, event, epsilon=budget, delta=1e-5,
                        compute=lambda state: (os.urandom(8), b""))
    except LedgerError:
        continue  # the other one holds the lock
    except Refusal as refusal:
        if "no longer stored" in str(refusal):
            continue
        break
    print(round, me if round % 2 == 0 else 0, reply.hex())
"""


def test_two_processes_cannot_spend_more_than_there_is(desk):
    budget = epsilon([EVENT] * 25, DELTA)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, desk.folder, str(budget), str(me)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for me in (1, 2)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    lines = [line.split() for racer in racers for line in racer.communicate(timeout=60)[0].splitlines()]
    assert [racer.returncode for racer in racers] == [0, 0]
    replies: dict[tuple[str, str], set[str]] = {}
    for round, who, reply in lines:
        replies.setdefault((round, who), set()).add(reply)
    assert all(len(found) == 1 for found in replies.values())  # whoever asks, one question has one answer
    assert len(replies) <= desk.charges() == 25
    with PrivacyLedger(ledger_path(desk.folder), readonly=True) as ledger:
        assert epsilon(ledger.history(CLIENT), DELTA) <= budget
