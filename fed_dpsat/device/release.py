"""One release of a device: noted, charged, computed, kept, and only then given away.

=============================================== ================================================================
the server sends                                the device
=============================================== ================================================================
a new (run, round, attempt)                     charges it, computes, keeps the reply, sends it
the same message again, the reply is kept       sends the kept reply, bit for bit; nothing is charged
the same again, killed before a reply was kept  computes under the charge that it has: nothing had left
the same again, a later reply took its place    refuses; nothing is charged
the same (run, round, attempt), other content   refuses; nothing is charged
another attempt, another round, another run     a new release, charged
a message that costs more than what is left     refuses; nothing is charged
=============================================== ================================================================

The budget is over everything that the device ever released, in whatever run, by whatever node id. The ledger's client
is ``CLIENT`` and its round the number of the release, counted from 1, so two releases never share a row. A reply leaves
only after it was kept and its charge settled as released; so a charge that is not settled has released nothing.
No clock is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fed_dpsat.accounting import LedgerError, PrivacyEvent, PrivacyLedger
from fed_dpsat.accounting.plans import BudgetError, spend
from fed_dpsat.device.journal import Journal, Kept, Refusal, Request, open_journal
from fed_dpsat.errors import SettingError

CLIENT, ATTEMPT = 0, 0
"""The key of a device's charges is the number of the release alone."""

RELEASED = "released"
ACCOUNTANT = "pld"

Compute = Callable[[bytes | None], tuple[bytes, bytes]]
"""The optimizer's last state to ``(reply, state)``."""


def ledger_path(folder: Path) -> Path:
    """Where a device's ledger lies."""
    return folder / "ledger.sqlite"


def journal_path(folder: Path) -> Path:
    """Where a device's journal lies."""
    return folder / "journal.sqlite"


def check_answers(ledger: PrivacyLedger, journal: Journal) -> None:
    """``LedgerError`` for a ledger without the charge of the last answer that the device made: an older copy."""
    kept = journal.kept()
    if kept is not None and ledger.outcome(CLIENT, kept.number, ATTEMPT) is None:
        raise LedgerError(
            f"{ledger.path} does not hold the charge of answer {kept.number}, which {journal.path} keeps: it is an "
            "older copy, or another device's; restore the right one"
        )


def prepare(folder: Path) -> None:
    """Make the ledger of a new device; ``SettingError`` if there is one: a budget begins once."""
    if ledger_path(folder).exists():
        raise SettingError("folder", str(folder), "without a ledger", "a device is made once; its budget goes on")
    folder.mkdir(parents=True, exist_ok=True)
    with PrivacyLedger(ledger_path(folder)), open_journal(journal_path(folder)):
        pass


def release(
    folder: Path, request: Request, event: PrivacyEvent, *, epsilon: float, delta: float, compute: Compute
) -> bytes:
    """The reply to ``request``, which costs ``event``, within a budget of ``epsilon`` at ``delta``.

    Raises ``Refusal`` for what the table refuses, ``LedgerError`` where the files cannot be trusted or written, and
    what ``compute`` raises, which stays charged. Nothing leaves by any of these.
    """
    with PrivacyLedger(ledger_path(folder), must_exist=True) as ledger, open_journal(journal_path(folder)) as journal:
        check_answers(ledger, journal)
        number, kept = journal.number(request), journal.kept()
        if kept is not None and kept.number == number:
            ledger.settle(CLIENT, number, ATTEMPT, RELEASED)
            return kept.reply
        new = number is None
        number = max(journal.last(), ledger.last_round(CLIENT), 0) + 1 if number is None else number
        outcome = ledger.outcome(CLIENT, number, ATTEMPT)
        if outcome:
            raise Refusal(
                f"round={request.round}, attempt={request.attempt} of run {request.run} was answered, and the answer "
                "is no longer kept; ask for a new attempt, which is charged anew"
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
    """The state of an earlier round of the run, or of the run that this one resumes: the same settings, further on."""
    if kept is None or (kept.run != request.run and kept.settings != request.settings):
        return None
    return kept.state if (kept.round, kept.attempt) < (request.round, request.attempt) else None
