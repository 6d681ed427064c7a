"""The clients of a simulation in one process: the host runs them one after the other and keeps their states.

If ``stack_clients`` is above 1 and the client app supports it, the host trains that many clients together. Stacks are
cut by position in the round and never split between workers, so they do not depend on the number of workers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fed_dpsat.client.train import say_unstackable
from fed_dpsat.errors import warn_once
from fed_dpsat.flower import sums
from fed_dpsat.flower.client_app import StackingClientApp, StackReply
from fed_dpsat.flower.grid import FIRST_NODE_ID, Answers, Span, answer, error_reply, node_context
from fed_dpsat.flower.judge import judge_stack
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.simulation.faults import Faults
from fed_dpsat.simulation.state import Since, StateStore
from fed_dpsat.step.stacked import Unstackable
from fed_dpsat.step.threads import intra_op_threads

log = logging.getLogger("fed_dpsat")

FAILED_TOGETHER = "stack_clients: %d clients one after the other, because one failed: %s"


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A message and its client; ``before`` is the round of ``context.state``."""

    message: Message
    client: int
    round: int | None
    before: int | None
    context: Context


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
        of_clients = run_config.get("privacy_unit") == "client"
        self._clip_norm = float(run_config["clip_norm"]) if of_clients else None
        self.stack_clients = int(run_config.get("stack_clients", 1))

    def answers(
        self, messages: Sequence[Message], since: Since, *, release_counts: bool | None, start: int = 0
    ) -> Answers:
        """All replies; or, unless ``release_counts`` is None, the nodes of the summation tree of the valid replies.

        ``start`` is the position of the first message in its round.
        """
        done, tree = Answers(), sums.Tree(start)
        with intra_op_threads(1):  # a client app sets its own number
            for at in range(0, len(messages), self.stack_clients):
                stack = messages[at : at + self.stack_clients]
                if release_counts is None:
                    done.replies += self._stack(stack, since, done)
                    continue
                for part in self._parts(stack, since, done, start + at, release_counts=release_counts):
                    tree.add(part)
        done.parts = tree.nodes
        return done

    def _parts(
        self, messages: Sequence[Message], since: Since, done: Answers, start: int, *, release_counts: bool
    ) -> Iterable[sums.Part]:
        together = True
        if self._share_content(messages):
            try:
                parts = self._together(messages, since, done, start)
                if parts is not None:
                    return parts
            except Unstackable as unstackable:
                together = False
                say_unstackable(unstackable)
            except Exception as error:  # the client that failed fails again alone
                together = False
                log.warning(FAILED_TOGETHER, len(messages), error)
        replies = self._stack(messages, since, done, together=together)
        pairs = zip(messages, replies, strict=True)
        return (self._part(message, reply, release_counts) for message, reply in pairs)

    def _share_content(self, messages: Sequence[Message]) -> bool:
        """Whether these are training messages of one content, which a stacking app answers without a message each."""
        if len(messages) == 1 or self._faults or not isinstance(self._client_app, StackingClientApp):
            return False
        content = messages[0].content
        return all(m.content is content and m.metadata.message_type == MessageType.TRAIN for m in messages)

    def _together(self, messages: Sequence[Message], since: Since, done: Answers, start: int) -> list[sums.Part] | None:
        """The parts of clients that train from one content; None, and nothing kept, if they need messages.

        Clients without a state are a stack of their own: theirs has another form.
        """
        app, content = self._client_app, messages[0].content
        assert isinstance(app, StackingClientApp)
        started, clock = time.time(), time.perf_counter()
        clients = [message.metadata.dst_node_id - FIRST_NODE_ID for message in messages]
        kept = {client: self._store.load_kept(client, since.get(client)) for client in clients}
        if any(one is None and client in since for client, one in kept.items()):
            return None
        replies: list[tuple[list[int], StackReply]] = []
        for new in (True, False):
            some = {client: one for client, one in kept.items() if (one is None) == new}
            if some:
                reply = app.train_stack(content, self._run_config, some)
                if reply is None:
                    return None
                replies.append((list(some), reply))
        trained = [client for some, _ in replies for client in some]
        order = [trained.index(client) for client in clients] if len(replies) > 1 else list(range(len(clients)))
        params = {name: torch.cat([reply.params[name] for _, reply in replies])[order] for name in replies[0][1].params}
        metrics = [one for _, reply in replies for one in reply.metrics]
        verdicts = judge_stack(params, content, clients, [metrics[i] for i in order])
        round = records.read_assignment(content).round
        for group, reply in replies:
            self._store.save_stack(group, round, reply.state, reply.histories, since)
        done.kept |= dict.fromkeys(clients, round)
        share = (time.perf_counter() - clock) / len(clients)
        done.spans += [Span(client, started + i * share, share) for i, client in enumerate(clients)]
        return sums.stack_parts(params, clients, verdicts, start)

    def _stack(
        self, messages: Sequence[Message], since: Since, done: Answers, *, together: bool = True
    ) -> Iterator[Message]:
        started, clock = time.time(), time.perf_counter()
        asked = [self._asked(message, since) for message in messages]
        present = [i for i, one in enumerate(asked) if not self._drops_out(one)]
        answers = dict(zip(present, self._answers_of([asked[i] for i in present], together), strict=True))
        share = (time.perf_counter() - clock) / len(asked)
        for i, one in enumerate(asked):
            clock = time.perf_counter()
            reply = self._judged(one, answers.get(i))
            trained = reply.has_content() or reply.error.code == compat.SIMULATED_FAULT
            if trained and one.context.state and one.message.metadata.message_type == MessageType.TRAIN:
                kept = (one.before or 0) + 1 if one.round is None else one.round
                self._store.save(one.client, kept, one.context.state, one.before)
                done.kept[one.client] = kept
            done.spans.append(Span(one.client, started + i * share, share + time.perf_counter() - clock))
            yield reply

    def _asked(self, message: Message, since: Since) -> _Asked:
        node_id = message.metadata.dst_node_id
        client = node_id - FIRST_NODE_ID
        before = since.get(client)
        state = self._store.load(client, before)
        context = node_context(node_id, self._run_config, self._num_nodes, state)
        return _Asked(message=message, client=client, round=_round(message.content), before=before, context=context)

    def _answers_of(self, asked: Sequence[_Asked], together: bool) -> list[Message]:
        """The replies in order; if a stack fails, each client alone, so that one client does not fail the others."""
        app = self._client_app
        training = [one for one in asked if one.message.metadata.message_type == MessageType.TRAIN]
        together = together and len(training) == len(asked) > 1
        if together and isinstance(app, StackingClientApp):
            try:
                replies = app.train_together([one.message for one in asked], [one.context for one in asked])
                if replies is not None:
                    return replies
                warn_once(
                    "stack_clients: clients train one after the other: secure aggregation and devices reply one by one"
                )
            except Exception as error:  # the client that failed fails again alone
                log.warning(FAILED_TOGETHER, len(asked), error)
        return [answer(app, one.message, one.context) for one in asked]

    def _drops_out(self, one: _Asked) -> bool:
        return bool(self._faults and one.round and self._faults.drops_out(one.client, one.round))

    def _judged(self, one: _Asked, reply: Message | None) -> Message:
        """The reply after a simulated fault; ``reply`` is None for a client that dropped out."""
        if reply is None:
            return error_reply(one.message, "dropped out (simulated)", compat.SIMULATED_FAULT)
        faults, client, round = self._faults, one.client, one.round
        if faults and round and faults.comes_late(client, round) and reply.has_content():
            late = f"reply after {faults.seconds(client, round):.3g} s, client_timeout={faults.config.client_timeout:g}"
            return error_reply(one.message, f"{late} (simulated)", compat.SIMULATED_FAULT)
        return reply

    def _part(self, message: Message, reply: Message, release_counts: bool) -> sums.Part:
        client = message.metadata.dst_node_id - FIRST_NODE_ID
        return sums.judged_part(message, reply, client, release_counts=release_counts, clip_norm=self._clip_norm)


def _round(content: RecordDict) -> int | None:
    assignment = records.config_in(content, records.ASSIGNMENT)
    return None if assignment is None else int(assignment["round"])  # type: ignore[arg-type]
