"""The server's side of secure aggregation: four questions to each client, and the sum that comes of the answers.

Clients may go at any point. While a threshold of them is left, the sum of those whose update arrived comes out; else
nothing does, and the round has no valid reply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fed_dpsat.experiment import Task
from fed_dpsat.flower import compat, records
from fed_dpsat.flower.replies import Failure, judge
from fed_dpsat.flower.secure_client import MASKED, SECURE, flat
from fed_dpsat.flower.sums import Part
from fed_dpsat.secagg.fixed_point import decode, fraction_bits
from fed_dpsat.secagg.rounds import PublicKeys, unmask


class TooFew(Exception):
    """Fewer clients are left than the threshold."""


def secure_sum(
    grid: Grid,
    messages: Sequence[Message],
    tasks: Mapping[int, Task],
    clients: Mapping[int, int],
    *,
    threshold_share: float,
    release_counts: bool,
    timeout: float,
) -> Part:
    """What ``messages`` of one round come to: the mean of the models of those whose update arrived, and who failed.

    ``clients`` are by node. ``threshold_share`` of those asked, and at least a majority, must stay to the end.
    """
    round = _Round(grid, messages, clients, release_counts=release_counts, timeout=timeout, tasks=tasks)
    threshold = max(math.ceil(threshold_share * len(messages)), len(messages) // 2 + 1, 2)
    try:
        total = round.run(threshold)
    except (TooFew, ValueError) as error:
        reason = Failure(reason=f"secure aggregation: {error}")
        return Part(failed={**dict.fromkeys(tasks, reason), **round.failed})
    part = Part(accepted=dict(sorted(round.accepted.items())), failed=round.failed, total=total)
    part.scale = part.weight
    return part


class _Round:
    """One run of the protocol; ``failed`` and ``accepted`` grow as it goes."""

    def __init__(
        self,
        grid: Grid,
        messages: Sequence[Message],
        clients: Mapping[int, int],
        *,
        tasks: Mapping[int, Task],
        release_counts: bool,
        timeout: float,
    ) -> None:
        self._grid, self._clients, self._tasks = grid, clients, tasks
        self._release_counts, self._timeout = release_counts, timeout
        self._content = {clients[m.metadata.dst_node_id]: m.content for m in messages}
        self._nodes = {clients[m.metadata.dst_node_id]: m.metadata.dst_node_id for m in messages}
        self.failed: dict[int, Failure] = {}
        self.accepted: dict[int, dict[str, float]] = {}

    def run(self, threshold: int) -> dict[str, torch.Tensor]:
        """The mean model. Raises ``TooFew``, or ``ValueError`` for answers that do not fit together."""
        keys = self._ask("keys", {client: {} for client in self._content}, threshold, _said)
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
        number = str(next(iter(self._tasks.values())).round)
        total = unmask(number, roster, masked, found, threshold)
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
        """What ``read`` makes of each client's answer. Those without a good one have failed, unless it is ``late``."""
        sent = [self._message(client, {"phase": phase, **question}) for client, question in questions.items()]
        answers: dict[int, Any] = {}
        problems: dict[int, Failure] = {}
        for reply in self._grid.send_and_receive(sent, timeout=self._timeout):
            client = self._clients.get(reply.metadata.src_node_id, -1)
            if client not in questions or client in answers or client in problems:
                continue
            try:
                answers[client] = read(client, reply)
            except _Bad as bad:
                problems[client] = bad.failure
        if not late:
            absent = Failure(reason=f"no answer in the phase {phase!r} of secure aggregation")
            self.failed |= {client: problems.get(client, absent) for client in questions if client not in answers}
        if len(answers) < threshold:
            raise TooFew(f"{len(answers)} clients in the phase {phase!r}, threshold={threshold}")
        return dict(sorted(answers.items()))

    def _message(self, client: int, question: Mapping[str, Any]) -> Message:
        given = self._content[client]
        content = RecordDict({**given} if question["phase"] == "masked" else {records.TASK: given[records.TASK]})
        content[SECURE] = ConfigRecord(dict(question))
        return Message(content, self._nodes[client], MessageType.TRAIN)

    def _judged(self, examples: Mapping[int, float]) -> Callable[[int, Message], Any]:
        like = ArrayRecord({MASKED: Array(np.zeros(flat(self._like).size, dtype=np.uint64))})
        self._metrics: dict[int, dict[str, float]] = {}

        def read(client: int, reply: Message) -> Any:
            verdict = judge(
                reply, client=client, task=self._tasks[client], like=like, release_counts=self._release_counts
            )
            if isinstance(verdict, Failure):
                raise _Bad(verdict)
            if verdict[records.NUM_EXAMPLES] != examples[client]:
                raise _Bad(Failure(reason=f"{verdict[records.NUM_EXAMPLES]} examples, and {examples[client]:g} before"))
            self._metrics[client] = verdict
            return compat.view(reply.content.array_records[records.ARRAYS][MASKED])

        return read

    @property
    def _like(self) -> ArrayRecord:
        return next(iter(self._content.values())).array_records[records.ARRAYS]

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
        broken = reply.error.code != compat.SIMULATED_FAULT
        raise _Bad(Failure(reason=f"failed: {reply.error.reason}", broken=broken))
    record = reply.content.config_records.get(SECURE)
    if record is None or record.get("client") != client:
        raise _Bad(Failure(reason=f"no record {SECURE!r} of client {client}"))
    return dict(record)
