"""What came of a round: written down for the reader, settled in the ledger, an end where nobody works any more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.flower.judge import BYTES, Failure, Verdicts
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.flower.wire import records

log = getLogger("fed_dpsat")

MAX_FAILED_ROUNDS = 3
"""Rounds in a row without a valid reply, and with a client that failed or sent another, after which a run ends."""

DIVERGED = "; if that is a model that diverged, start a new run with a lower lr"


@dataclass(kw_only=True)
class RoundReport:
    """Who was asked, who was dropped and why, who retired with which epsilon; how many ``tossed`` a
    coin for it, if the inner strategy asked all whom coins drew.

    ``arrived`` is of asynchronous rounds: whose update moved the model, and how many rounds ago it had set out.
    ``failed_rounds`` are those in a row, until this one, in which clients failed or sent invalid replies, and no reply
    was valid; rounds in which all who were asked were absent, or nobody was asked, neither count nor break the row.
    """

    round: int
    failed_rounds: int = 0
    asked: list[int] = field(default_factory=list)
    tossed: int | None = None
    accepted: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    retired: dict[int, float] = field(default_factory=dict)
    released: dict[int, dict[str, Any]] = field(default_factory=dict)
    at_fault: dict[int, Failure] = field(default_factory=dict)
    arrived: dict[int, int] | None = None
    simulated_seconds: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    kept_model: bool = False

    def note(self, verdicts: Verdicts, *, release_counts: bool) -> None:
        """What became of everybody who was asked."""
        for client in self.asked:
            verdict = verdicts.get(client, Failure(reason="no reply", kind="absent"))
            if not isinstance(verdict, Failure):
                self.accepted.append(client)
                self.bytes_up += int(verdict[BYTES])
                if release_counts:
                    self.released[client] = {records.NONFINITE: verdict[records.NONFINITE]}
                continue
            self.dropped[client] = verdict.reason
            if verdict.kind != "absent":
                self.at_fault[client] = verdict
            log.warning("round %d: client %d dropped: %s", self.round, client, verdict.reason)

    def settle(self, ledger: PrivacyLedger, assignments: Mapping[int, Assignment]) -> None:
        """Write outcomes beside the charges, but for those that a driver wrote before it died."""
        for attempt, events in by_attempt(assignments):
            settled = ledger.outcomes(self.round, attempt)
            outcomes = {c: self.dropped.get(c, "released") for c in events if c not in settled}
            ledger.settle_many(self.round, attempt, outcomes)

    def count_failure(self, num_clients: int) -> None:
        """Raise ``FederationError`` after enough ``failed_rounds``, or if all there are were asked and failed."""
        if self.accepted or not self.at_fault:
            self.failed_rounds = 0 if self.accepted else self.failed_rounds
            return
        self.failed_rounds += 1
        failed = [client for client, failure in self.at_fault.items() if failure.kind == "failed"]
        if len(failed) == num_clients or self.failed_rounds == MAX_FAILED_ROUNDS:
            client, first = next(iter(self.at_fault.items()))
            what = "no reply was valid" if len(failed) < len(self.asked) else "every client that was asked failed"
            raise FederationError(
                f"{what}, {self.failed_rounds} round(s) in a row until round {self.round}; client {client}: "
                f"{first.reason}{DIVERGED if first.kind == 'invalid' else ''}"
            )


def by_attempt(assignments: Mapping[int, Assignment]) -> Iterator[tuple[int, dict[int, PrivacyEvent]]]:
    """The events of each attempt; most rounds have one."""
    for attempt in sorted({assignment.attempt for assignment in assignments.values()}):
        yield (
            attempt,
            {client: assignment.event for client, assignment in assignments.items() if assignment.attempt == attempt},
        )
