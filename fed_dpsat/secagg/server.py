"""The server in secure aggregation: four messages to each client, and the sum of their updates.

Clients may drop out at any point. With at least ``threshold`` clients left, the result is the sum of the updates that
arrived; with fewer, the round has no valid reply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fed_dpsat.flower.judge import Failure, judge
from fed_dpsat.flower.round import Round, RoundKind
from fed_dpsat.flower.sums import Part
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.flower.wire.records import MASKED, SECURE
from fed_dpsat.secagg.client import flat
from fed_dpsat.secagg.fixed_point import decode, fraction_bits
from fed_dpsat.secagg.rounds import PublicKeys, unmask


class TooFew(Exception):
    """The number of clients is below the threshold."""


class SecureSums(RoundKind):
    """Rounds with masked replies. ``threshold`` is the share of the cohort that must stay until the last phase.

    The number of clients is at least a majority, and at least two.
    """

    hides = "secure_aggregation hides them"

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def ask(self, round: Round, grid: Grid, timeout: float) -> list[Message | Part]:
        """One part: the mean of the models that arrived, and the failed clients; empty for an empty cohort."""
        return [self._sum(round, grid, timeout)] if round.messages else []

    def _sum(self, round: Round, grid: Grid, timeout: float) -> Part:
        protocol, asked = _Protocol(round, grid, timeout), len(round.messages)
        threshold = max(math.ceil(self.threshold * asked), asked // 2 + 1, 2)
        try:
            total = protocol.run(threshold)
        except (TooFew, ValueError) as error:
            kind: Literal["absent", "invalid"] = "absent" if isinstance(error, TooFew) else "invalid"
            reason = Failure(reason=f"secure aggregation: {error}", kind=kind)
            return Part(failed={**dict.fromkeys(round.messages, reason), **protocol.failed})
        part = Part(accepted=dict(sorted(protocol.accepted.items())), failed=protocol.failed, total=total)
        part.scale = part.weight
        return part


class _Protocol:
    """One run of the protocol; ``failed`` and ``accepted`` grow as it goes."""

    def __init__(self, round: Round, grid: Grid, timeout: float) -> None:
        self._round, self._grid, self._timeout = round, grid, timeout
        self.failed: dict[int, Failure] = {}
        self.accepted: dict[int, Mapping[str, float]] = {}

    def run(self, threshold: int) -> dict[str, torch.Tensor]:
        """The mean model. Raises ``TooFew``, or ``ValueError`` for inconsistent replies."""
        keys = self._ask("keys", {client: {} for client in self._round.messages}, threshold, _said)
        roster = {c: PublicKeys(seal=said["seal"], mask=said["mask"]) for c, said in keys.items()}
        listed = {
            "clients": list(roster),
            "seal": [k.seal for k in roster.values()],
            "mask": [k.mask for k in roster.values()],
        }
        shares = self._ask(
            "shares", {client: {**listed, "threshold": threshold} for client in roster}, threshold, _said
        )
        sealed = {c: dict(zip(said["holders"], said["sealed"], strict=True)) for c, said in shares.items()}
        examples = {client: float(keys[client]["num_examples"]) for client in sealed}
        total_examples = math.fsum(examples.values())
        masked = self._ask(
            "masked",
            {
                holder: {
                    "clients": list(sealed),
                    "sealed": [texts[holder] for texts in sealed.values()],
                    "total_examples": total_examples,
                }
                for holder in sealed
            },
            threshold,
            self._judged(examples),
        )
        opened = self._ask(
            "open", {client: {"arrived": list(masked)} for client in masked}, threshold, _said, late=True
        )
        found = {c: dict(zip(said["owners"], said["opened"], strict=True)) for c, said in opened.items()}
        total = unmask(str(self._round.number), roster, masked, found, threshold)
        self.accepted = {client: self._metrics[client] for client in masked}
        move = decode(total, math.fsum(examples[client] for client in masked), fraction_bits(total_examples))
        return self._moved(move)

    def _ask(
        self,
        phase: str,
        questions: Mapping[int, Mapping[str, Any]],
        threshold: int,
        read: Callable[[int, Message], Any],
        late: bool = False,
    ) -> dict[int, Any]:
        """The result of ``read`` for each valid reply. The other clients have failed, unless the phase is ``late``."""
        sent = [self._message(client, {"phase": phase, **question}) for client, question in questions.items()]
        answers: dict[int, Any] = {}
        problems: dict[int, Failure] = {}
        for reply in self._grid.send_and_receive(sent, timeout=self._timeout):
            client = self._round.directory.client_at(reply.metadata.src_node_id)
            if client is None or client not in questions or client in answers or client in problems:
                continue
            try:
                answers[client] = read(client, reply)
            except _Bad as bad:
                problems[client] = bad.failure
        if not late:
            absent = Failure(reason=f"no reply in the phase {phase!r} of secure aggregation", kind="absent")
            self.failed |= {client: problems.get(client, absent) for client in questions if client not in answers}
        if len(answers) < threshold:
            raise TooFew(f"{len(answers)} clients in the phase {phase!r}, threshold={threshold}")
        return dict(sorted(answers.items()))

    def _message(self, client: int, question: Mapping[str, Any]) -> Message:
        asked = self._round.messages[client]
        given = asked.content
        content = RecordDict(
            {**given} if question["phase"] == "masked" else {records.ASSIGNMENT: given[records.ASSIGNMENT]}
        )
        content[SECURE] = ConfigRecord(dict(question))
        return Message(content, asked.metadata.dst_node_id, MessageType.TRAIN)

    def _judged(self, examples: Mapping[int, float]) -> Callable[[int, Message], Any]:
        like = ArrayRecord({MASKED: Array(np.zeros(flat(self._like).size, dtype=np.uint64))})
        self._metrics: dict[int, Mapping[str, float]] = {}

        def read(client: int, reply: Message) -> Any:
            asked, release_counts = self._round.messages[client].content, self._round.release_counts
            verdict = judge(reply, asked, client, release_counts=release_counts, like=like)
            if isinstance(verdict, Failure):
                raise _Bad(verdict)
            if verdict[records.NUM_EXAMPLES] != examples[client]:
                raise _Bad(Failure(reason=f"{verdict[records.NUM_EXAMPLES]} examples, and {examples[client]:g} before"))
            self._metrics[client] = verdict
            return compat.view(reply.content.array_records[records.ARRAYS][MASKED])

        return read

    @property
    def _like(self) -> ArrayRecord:
        """The model in the messages, the base of all updates; a strategy may send another model than it received."""
        return next(iter(self._round.messages.values())).content.array_records[records.ARRAYS]

    def _moved(self, move: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, torch.Tensor]:
        after, start = {}, 0
        for name, array in self._like.items():
            before = compat.view(array)
            step = move[start : start + before.size].reshape(before.shape)
            after[name], start = torch.from_numpy((before + step).astype(before.dtype)), start + before.size
        return after


class _Bad(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def _said(client: int, reply: Message) -> dict[str, Any]:
    if reply.has_error():
        raise _Bad(Failure.of_error(reply.error.reason, reply.error.code))
    record = reply.content.config_records.get(SECURE)
    if record is None or record.get("client") != client:
        raise _Bad(Failure(reason=f"no record {SECURE!r} of client {client}"))
    return dict(record)
