"""A Flower ``Grid`` for simulations: nodes are numbers, and a backend answers their messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fed_dpsat.flower import compat
from fed_dpsat.flower.records import PARTITION_ID


class Backend(Protocol):
    """Where client apps run."""

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        """One reply per message, in any order, as they come."""

    def close(self) -> None:
        """Let go of processes and memory."""


class SimulationGrid(Grid):
    """``num_nodes`` nodes on one ``backend``; the node of partition ``p`` has the id ``FIRST_NODE_ID + p``."""

    def __init__(self, backend: Backend, num_nodes: int) -> None:
        compat.identify_process()
        self._backend = backend
        self._nodes = range(FIRST_NODE_ID, FIRST_NODE_ID + num_nodes)
        self._ids = itertools.count(1)
        self._run = compat.empty_run()
        self._replies: dict[str, Message] = {}

    def set_run(self, run: compat.Run) -> None:
        """Take over ``run``."""
        self._run = run

    @property
    def run(self) -> compat.Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, always there."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer ``messages`` and hold the replies; returns their ids."""
        sent = self._number(messages)
        self._replies |= {reply.metadata.reply_to_message_id: reply for reply in self._backend.run(sent)}
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to ``message_ids`` that were not pulled before."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """One reply per message, as they come; ``timeout`` is for networks and not used here."""
        return list(self._backend.run(self._number(messages)))

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()

    def _number(self, messages: Iterable[Message]) -> list[Message]:
        sent = list(messages)
        for message in sent:
            compat.set_message_id(message, str(next(self._ids)))
        return sent


FIRST_NODE_ID = compat.SERVER_NODE_ID + 1


def node_context(node_id: int, run_config: Mapping[str, Any], num_nodes: int) -> Context:
    """The context that Flower's own simulation would give this node, with an empty state."""
    return Context(
        run_id=compat.SIMULATION_RUN_ID,
        node_id=node_id,
        node_config={PARTITION_ID: node_id - FIRST_NODE_ID, "num-partitions": num_nodes},
        state=RecordDict(),
        run_config=dict(run_config),
    )


def answer(client_app: ClientApp, message: Message, context: Context) -> Message:
    """What the node says: the app's reply, or its exception as an error reply."""
    try:
        reply = client_app(message, context)
    except Exception as error:  # a client's failure is an answer, whatever it is
        return error_reply(message, f"{type(error).__name__}: {error}", compat.ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
    return reply


def error_reply(message: Message, reason: str, code: int) -> Message:
    """An error in the place of a reply to ``message``."""
    return Message(Error(code=code, reason=reason), reply_to=message)
