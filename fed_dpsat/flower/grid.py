"""A Flower ``Grid`` for simulations: nodes are numbers, and a backend answers their messages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fed_dpsat.flower import sums
from fed_dpsat.flower.judge import Failure
from fed_dpsat.flower.wire import compat
from fed_dpsat.flower.wire.records import PARTITION_ID

FIRST_NODE_ID = compat.SERVER_NODE_ID + 1


class Span(NamedTuple):
    """The time of one client: its start in seconds since the epoch, and its length. ``worker`` 0 is the driver."""

    client: int
    started: float
    seconds: float
    worker: int = 0


@dataclass(kw_only=True)
class Answers:
    """The result of consecutive messages: replies in order, or their sums; saved states by client; and spans."""

    replies: list[Message] = field(default_factory=list)
    parts: list[sums.Part] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)


class Backend(Protocol):
    """The place that runs client apps."""

    def run(
        self, messages: Sequence[Message], *, release_counts: bool | None, timeout: float | None
    ) -> Iterator[Answers]:
        """One reply per message, in order; or nodes of the tree of their sum, if ``release_counts`` is not None.

        A client without a reply after ``timeout`` seconds becomes an error. Raises ``RunError`` if no client is left.
        """

    def close(self) -> None:
        """Release processes and memory."""


class SimulationGrid(Grid):
    """``num_nodes`` nodes on one ``backend``; the node of partition ``p`` has the id ``FIRST_NODE_ID + p``.

    ``on_span`` receives the time of each client. ``seconds`` maps client and round to the simulated time until the
    reply; None without simulated time.
    """

    def __init__(
        self,
        backend: Backend,
        num_nodes: int,
        on_span: Callable[[Span], None] | None = None,
        *,
        seconds: Callable[[int, int], float] | None = None,
    ) -> None:
        compat.identify_process()
        self._backend = backend
        self._nodes = range(FIRST_NODE_ID, FIRST_NODE_ID + num_nodes)
        self._ids = itertools.count(1)
        self._run = compat.empty_run()
        self._replies: dict[str, Message] = {}
        self.on_span, self.seconds = on_span, seconds

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

    def nodes_by_client(self, num_clients: int) -> dict[int, int]:
        """Client to node id: the result of ``identify_nodes``, without a message."""
        return {client: FIRST_NODE_ID + client for client in range(num_clients)}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer ``messages`` and keep the replies; returns the ids of the messages."""
        sent = list(messages)
        self._replies |= {reply.metadata.reply_to_message_id: reply for reply in self.stream(sent)}
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to ``message_ids`` that were not pulled before."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """One reply per message, in order."""
        return list(self.stream(messages, timeout=timeout))

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """One reply per message, in order, as they come."""
        for answers in self._answers(messages, None, timeout):
            yield from answers.replies

    def add_up(
        self, messages: Iterable[Message], *, release_counts: bool, timeout: float | None = None
    ) -> Iterator[sums.Part]:
        """The sums of the replies to ``messages`` of one training round, in order; workers add them up."""
        for answers in self._answers(messages, release_counts, timeout):
            yield from answers.parts

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()

    def _answers(
        self, messages: Iterable[Message], release_counts: bool | None, timeout: float | None
    ) -> Iterator[Answers]:
        sent = list(messages)
        for message in sent:
            compat.set_message_id(message, str(next(self._ids)))
        for answers in self._backend.run(sent, release_counts=release_counts, timeout=timeout):
            if self.on_span:
                for span in answers.spans:
                    self.on_span(span)
            yield answers


def unanswered(messages: Sequence[Message], reason: str, code: int, *, summed: bool) -> Answers:
    """An error for each of ``messages``, whose clients are gone."""
    if not summed:
        return Answers(replies=[error_reply(message, reason, code) for message in messages])
    failure = Failure.of_error(reason, code)
    clients = [message.metadata.dst_node_id - FIRST_NODE_ID for message in messages]
    return Answers(parts=[sums.Part(failed={client: failure}) for client in clients])


def node_context(
    node_id: int, run_config: Mapping[str, Any], num_nodes: int, state: RecordDict | None = None
) -> Context:
    """The context that Flower's own simulation would give this node, with an empty state or this one."""
    return Context(
        run_id=compat.SIMULATION_RUN_ID,
        node_id=node_id,
        node_config={PARTITION_ID: node_id - FIRST_NODE_ID, "num-partitions": num_nodes},
        state=RecordDict() if state is None else state,
        run_config=dict(run_config),
    )


def answer(client_app: ClientApp, message: Message, context: Context) -> Message:
    """The app's reply, or its exception as an error reply."""
    try:
        reply = client_app(message, context)
    except Exception as error:  # any failure of a client is an answer
        return error_reply(message, f"{type(error).__name__}: {error}", compat.ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
    return reply


def error_reply(message: Message, reason: str, code: int) -> Message:
    """An error instead of a reply to ``message``."""
    return Message(Error(code=code, reason=reason), reply_to=message)
