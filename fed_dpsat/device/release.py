"""One release of a device: record it, charge it, compute it, store it, and only then send it.

=============================================== ================================================================
the server sends                                the device
=============================================== ================================================================
a new (run, round, attempt)                     charges it, computes, keeps the reply, sends it
the same message again, the reply is stored     sends the stored reply, bit for bit; charges nothing
the same message, killed before it stored one   computes under the existing charge: nothing had left
the same message, a later reply replaced it     refuses; charges nothing
the same (run, round, attempt), other content   refuses; charges nothing
another attempt, another round, another run     makes and charges a new release
a message that costs more than the rest         refuses; charges nothing
=============================================== ================================================================

The budget covers all releases of the device, over all runs and node ids. In its ledger the client is ``CLIENT`` and the
round is the number of the release, counted from 1, so two releases never share a row. A reply leaves only after it is
stored and its charge is settled as released; so a charge without an outcome has released nothing. No rule depends on a
clock.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fed_dpsat.accounting import LedgerError, PrivacyEvent, PrivacyLedger
from fed_dpsat.accounting.plans import BudgetError, spend
from fed_dpsat.device.journal import Journal, Kept, Refusal, Request, open_journal
from fed_dpsat.errors import SettingError

CLIENT, ATTEMPT = 0, 0
"""Constant parts of the key of a charge; its round is the number of the release."""

RELEASED = "released"
ACCOUNTANT = "pld"

Compute = Callable[[bytes | None], tuple[bytes, bytes]]
"""Maps the last state of the optimizer to ``(reply, state)``."""


def ledger_path(folder: Path) -> Path:
    """Path of the ledger of a device."""
    return folder / "ledger.sqlite"


def journal_path(folder: Path) -> Path:
    """Path of the journal of a device."""
    return folder / "journal.sqlite"


def open_ledger(folder: Path, *, readonly: bool = False) -> PrivacyLedger:
    """The ledger of a device. Raises ``LedgerError`` for a folder without a ledger, or with an invalid one."""
    if not (path := ledger_path(folder)).exists():
        raise LedgerError(
            f"no ledger at {path}; create that of a new device with `fed-dpsat device init POLICY`; if this device has "
            "answered a server before, restore it: without it the spent epsilon is unknown"
        )
    return PrivacyLedger(path, readonly=readonly, must_exist=True)


def check_last_reply(ledger: PrivacyLedger, journal: Journal) -> None:
    """Raise ``LedgerError`` if the ledger lacks the charge of the last reply: it is an older copy."""
    kept = journal.kept()
    if kept is not None and ledger.outcome(CLIENT, kept.number, ATTEMPT) is None:
        raise LedgerError(
            f"{ledger.path} does not hold the charge of reply {kept.number} in {journal.path}: it is an older copy, or "
            "the ledger of another device; restore the right one"
        )


def prepare(folder: Path) -> None:
    """Create the ledger of a new device. A budget starts once, so ``SettingError`` if it exists, or for the folder."""
    if ledger_path(folder).exists():
        raise SettingError("folder", str(folder), "without a ledger", "run init once; the budget of a device continues")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        bound = f"a folder that can be created ({error.strerror})"
        raise SettingError("folder", str(folder), bound, "choose another one in the policy") from error
    with PrivacyLedger(ledger_path(folder)), open_journal(journal_path(folder)):
        pass


def release(
    folder: Path, request: Request, event: PrivacyEvent, *, epsilon: float, delta: float, compute: Compute
) -> bytes:
    """The reply to ``request``, which costs ``event``, within a budget of ``epsilon`` at ``delta``.

    Raises ``Refusal`` as in the table, ``LedgerError`` for files that are invalid or cannot be written, and any
    exception of ``compute``, whose charge stays. With an exception nothing leaves the device.
    """
    with open_ledger(folder) as ledger, open_journal(journal_path(folder)) as journal:
        check_last_reply(ledger, journal)
        number, kept = journal.number(request), journal.kept()
        if kept is not None and kept.number == number:
            ledger.settle(CLIENT, number, ATTEMPT, RELEASED)
            return kept.reply
        new = number is None
        number = max(journal.last(), ledger.last_round(CLIENT), 0) + 1 if number is None else number
        outcome = ledger.outcome(CLIENT, number, ATTEMPT)
        if outcome:
            raise Refusal(
                f"round={request.round}, attempt={request.attempt} of run {request.run} had a reply, which is no "
                "longer stored; send a new attempt, which costs a new charge"
            )
        if outcome is None:
            _check_budget(ledger, event, epsilon, delta)
            if new:
                journal.begin(request, number)
            ledger.charge(CLIENT, number, ATTEMPT, event)
        reply, state = compute(_state_for(request, kept))
        journal.finish(request, number, reply, state)
        ledger.settle(CLIENT, number, ATTEMPT, RELEASED)
        return reply


def _check_budget(ledger: PrivacyLedger, event: PrivacyEvent, epsilon: float, delta: float) -> None:
    try:
        spend(ledger.history(CLIENT), event, epsilon, delta, ACCOUNTANT)
    except BudgetError as error:
        raise Refusal(str(error)) from None


def _state_for(request: Request, kept: Kept | None) -> bytes | None:
    """The state of an earlier round of this run, or of a run with the same settings that this run resumes."""
    if kept is None or (kept.run != request.run and kept.settings != request.settings):
        return None
    return kept.state if (kept.round, kept.attempt) < (request.round, request.attempt) else None
