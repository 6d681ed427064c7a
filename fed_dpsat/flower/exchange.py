"""A round once it is charged: which replies count, what is written down of them, what the inner strategy is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger

from flwr.app import Message

from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.flower import sums
from fed_dpsat.flower.handover import Aggregate, Handover
from fed_dpsat.flower.judge import Failure, Verdict, Verdicts, judge
from fed_dpsat.flower.nodes import Directory
from fed_dpsat.flower.report import RoundReport
from fed_dpsat.run.process import intra_op_threads
from fed_dpsat.run.timing import Phases

log = getLogger("fed_dpsat")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """``messages`` by client, not sent yet; ``assignments`` of all whom the round costs, in the ledger already."""

    messages: Mapping[int, Message]
    assignments: Mapping[int, Assignment]
    handover: Handover
    report: RoundReport
    ledger: PrivacyLedger
    directory: Directory
    phases: Phases

    def one_by_one(self, replies: Iterable[Message]) -> Aggregate:
        """Drop what is not valid, by name; the rest goes to the inner strategy in the order of clients."""
        return self.hand_over(self.report.asked, *self.judged(replies))

    def added_up(self, parts: Iterable[sums.Part]) -> Aggregate:
        """``one_by_one`` of replies that were judged and added up elsewhere."""
        with intra_op_threads(1):  # threads that wait for each other cost more than they add
            total = sums.merge(parts)
        self._note({**total.accepted, **total.failed})
        return self.handover.mean(total) if total.accepted or self.handover.release else self._keep_model()

    def judged(self, replies: Iterable[Message]) -> tuple[dict[int, Message], Verdicts]:
        """The valid ones by client, and what became of everybody's, which is noted."""
        verdicts: dict[int, Verdict] = {}
        valid: dict[int, Message] = {}
        for reply in replies:
            client = self._expected(reply, verdicts)
            if client is not None:
                verdicts[client] = verdict = judge(
                    reply,
                    self.messages[client].content,
                    client,
                    release_counts=self.handover.release_counts,
                    clip_norm=self.handover.clip_norm,
                )
                if not isinstance(verdict, Failure):
                    valid[client] = reply
        self._note(verdicts)
        return valid, verdicts

    def hand_over(self, order: Sequence[int], valid: Mapping[int, Message], verdicts: Verdicts) -> Aggregate:
        """``Handover.all``; without a valid reply the model stays, but for what a release makes of nothing."""
        return self.handover.all(order, valid, verdicts) if valid or self.handover.release else self._keep_model()

    def _expected(self, reply: Message, verdicts: Mapping[int, object]) -> int | None:
        """The client whose first reply this is; None, and a note, for any other reply."""
        node = self.directory.sender(reply, self.messages.values())
        client = self.directory.client_at(node)
        if client is None:
            self.report.unexpected.append(f"node {node} is no known client")
        elif client not in self.messages:
            self.report.unexpected.append(f"client {client} was not asked")
        elif client in verdicts:
            self.report.unexpected.append(f"client {client} replied again")
        else:
            return client
        return None

    def _note(self, verdicts: Verdicts) -> None:
        self.report.note(verdicts, release_counts=self.handover.release_counts)
        self.report.settle(self.ledger, self.assignments)
        self.report.count_failure(self.directory.num_clients)

    def _keep_model(self) -> Aggregate:
        self.report.kept_model = True
        log.warning("round %d: no valid reply, the model stays as it is", self.report.round)
        return None, None
