"""The status of a device: its budget, its rounds by run, and the integrity of its ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fed_dpsat.accounting import LedgerError, epsilon
from fed_dpsat.device.journal import open_journal
from fed_dpsat.device.log import last_line
from fed_dpsat.device.policy import Policy
from fed_dpsat.device.release import ACCOUNTANT, CLIENT, check_last_reply, journal_path, open_ledger


@dataclass(frozen=True, kw_only=True)
class DeviceStatus:
    """``epsilon_spent`` of ``epsilon_budget`` at ``delta``; ``integrity`` is "unbroken" or describes the damage."""

    client: int
    epsilon_spent: float
    epsilon_budget: float
    delta: float
    rounds: int
    rounds_by_run: dict[str, int]
    last_contact: str
    charges: int
    sha256: str
    integrity: str

    @property
    def epsilon_left(self) -> float:
        """The rest of the budget; 0 if the policy has a smaller budget than the spent epsilon."""
        return max(self.epsilon_budget - self.epsilon_spent, 0.0)


def read_status(policy: Policy) -> DeviceStatus:
    """The status of the device; ``integrity`` describes a damaged ledger. Raises ``LedgerError`` without a ledger."""
    folder = Path(policy.folder)
    with open_ledger(folder, readonly=True) as ledger, open_journal(journal_path(folder)) as journal:
        integrity = "unbroken"
        try:
            ledger.verify()
            check_last_reply(ledger, journal)
        except LedgerError as error:
            integrity = str(error)
        return DeviceStatus(
            client=policy.client,
            epsilon_spent=epsilon(ledger.history(CLIENT), policy.largest_delta, ACCOUNTANT),
            epsilon_budget=policy.largest_epsilon,
            delta=policy.largest_delta,
            rounds=ledger.rounds_by_client().get(CLIENT, 0),
            rounds_by_run=journal.rounds(),
            last_contact=last_line(folder),
            charges=ledger.head.charges,
            sha256=ledger.head.sha256,
            integrity=integrity,
        )
