"""The clients of a simulation in one process: they are asked one after the other, and keep their state in between."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fed_dpsat.flower import compat, records, sums
from fed_dpsat.flower.grid import FIRST_NODE_ID, Answers, Span, answer, error_reply, node_context
from fed_dpsat.flower.replies import judge
from fed_dpsat.process import intra_op_threads
from fed_dpsat.simulation.faults import Faults
from fed_dpsat.simulation.state import StateStore

Since = Mapping[int, int]
"""Client to the round that left its state."""


class Host:
    """``client_app`` for ``num_nodes`` nodes under ``run_config``, with their states in ``store``."""

    def __init__(
        self,
        client_app: ClientApp,
        run_config: Mapping[str, Any],
        num_nodes: int,
        store: StateStore,
        faults: Faults | None = None,
    ) -> None:
        self._client_app, self._run_config, self._num_nodes = client_app, run_config, num_nodes
        self._store, self._faults = store, faults

    def answers(self, messages: Sequence[Message], since: Since, *, release_counts: bool | None) -> Answers:
        """All replies; or, where ``release_counts`` is not None, the sum of the valid ones."""
        done = Answers()
        with intra_op_threads(1):  # a client app sets its own; threads that wait for each other cost more than they add
            replies = self._replies(messages, since, done)
            if release_counts is None:
                done.replies = list(replies)
            else:
                pairs = zip(messages, replies, strict=True)
                done.part = sums.merge(self._part(message, reply, release_counts) for message, reply in pairs)
        return done

    def _replies(self, messages: Sequence[Message], since: Since, done: Answers) -> Iterator[Message]:
        for message in messages:
            started, clock = time.time(), time.perf_counter()
            client = message.metadata.dst_node_id - FIRST_NODE_ID
            before = since.get(client)
            round = _round(message.content)
            state = self._store.load(client, before)
            reply = self._reply(message, client, round, state)
            trained = reply.has_content() or reply.error.code == compat.SIMULATED_FAULT
            if trained and state and message.metadata.message_type == MessageType.TRAIN:
                kept = (before or 0) + 1 if round is None else round
                self._store.save(client, kept, state, before)
                done.kept[client] = kept
            done.spans.append(Span(client, started, time.perf_counter() - clock))
            yield reply

    def _reply(self, message: Message, client: int, round: int | None, state: RecordDict) -> Message:
        faults = self._faults if round is not None else None
        if faults and round and faults.drops_out(client, round):
            return error_reply(message, "dropped out (simulated)", compat.SIMULATED_FAULT)
        context = node_context(message.metadata.dst_node_id, self._run_config, self._num_nodes, state)
        reply = answer(self._client_app, message, context)
        if faults and round and faults.comes_late(client, round) and reply.has_content():
            late = f"reply after {faults.seconds(client, round):.3g} s, client_timeout={faults.client_timeout:g}"
            return error_reply(message, f"{late} (simulated)", compat.SIMULATED_FAULT)
        return reply

    def _part(self, message: Message, reply: Message, release_counts: bool) -> sums.Part:
        client = message.metadata.dst_node_id - FIRST_NODE_ID
        verdict = judge(
            reply,
            client=client,
            task=records.read_task(message.content),
            like=message.content.array_records[records.ARRAYS],
            release_counts=release_counts,
        )
        return sums.part_of(client, reply, verdict)


def _round(content: RecordDict) -> int | None:
    task = content.config_records.get(records.TASK)
    return None if task is None else int(task["round"])  # type: ignore[arg-type]
