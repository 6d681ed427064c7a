"""Clients on Ray workers: each worker gets runs of messages, replies return in order, lost work is repeated.

A worker is an actor in a process of its own. It holds the client app with model, data, and the states of the clients
that it trained last.

=============================== ========================================================================
case                            what happens
=============================== ========================================================================
a worker dies                   its work is cut into stacks (of ``stack_clients``), and a stack that fails
                                again into clients. They run again from the same state: with seeded noise
                                the same bits, except the last bits of a stack that was cut. The dead
                                worker released nothing, so one charge is right
a client's worker dies often    an error instead of its reply, after ``MAX_TRIES``
a client takes longer than      its worker is killed and replaced; the client has one more try alone, then
``client_timeout``              its reply is an error
workers die without a result    ``RunError`` after ``MAX_TRIES`` deaths per worker plus ``MORE_DEATHS``
no worker starts                ``RunError`` within a minute
the object store is full        ``RunError``
=============================== ========================================================================
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from flwr.app import Message
from flwr.clientapp import ClientApp
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from fed_dpsat.errors import RunError
from fed_dpsat.flower.grid import FIRST_NODE_ID, Answers, Span, unanswered
from fed_dpsat.flower.wire import compat
from fed_dpsat.simulation.cluster import connect, explained
from fed_dpsat.simulation.faults import Faults
from fed_dpsat.simulation.ray_pool import Pool, Slot, Work
from fed_dpsat.simulation.ray_worker import Shelf

log = logging.getLogger("fed_dpsat")

AHEAD_PER_WORKER = 16
"""Largest number of answers that may wait for an earlier one; it bounds the memory of the object store."""
MAX_TRIES = 3
MORE_DEATHS = 12
"""The backend drops a few clients that kill workers; more deaths without an answer end the run."""
POLL_SECONDS = 0.2
SHARES_PER_WORKER = 2
"""A worker gets at most 1 / (this number times the workers) of the remaining clients, so that workers end together."""
SHARE_SECONDS = 0.02, 0.5
"""Least and most seconds of work per message: a message costs 10 ms, and a dead worker loses its work."""
MIN_SHARES = 64
"""Least number of messages per round before the time of a client is known, or if each reply is sent."""
PLENTY_PER_WORKER = 3
"""With more waiting work per worker, each worker gets its next work before it ends the last, however slow it is."""


class RayBackend:
    """``num_workers`` processes with one CPU and ``gpus_per_worker`` GPUs each.

    A Ray that already runs, or that ``address`` names, stays running. States go into ``state_folder``; ``kept`` names
    the states at the start. With a ``fingerprint``, workers build the experiment and compare it. Raises ``RunError`` as
    ``Pool`` does.
    """

    def __init__(
        self,
        client_app: ClientApp,
        run_config: Mapping[str, Any],
        num_nodes: int,
        num_workers: int,
        *,
        address: str = "",
        state_folder: Path | None = None,
        kept: Mapping[int, int] | None = None,
        faults: Faults | None = None,
        client_timeout: float = 0.0,
        gpus_per_worker: float = 0.0,
        fingerprint: str = "",
    ) -> None:
        self._own_folder = TemporaryDirectory(prefix="fed_dpsat-")
        folder = (state_folder or Path(self._own_folder.name)).absolute()  # workers may run in another directory
        folder.mkdir(parents=True, exist_ok=True)
        self._kept = dict(kept or {})
        self._home: dict[int, Slot] = {}
        self._client_timeout = client_timeout
        self._stack = int(run_config.get("stack_clients", 1))
        self._seconds_per_client = 0.0
        self._deaths = 0
        self._disconnect = connect(address, num_workers)
        try:
            with explained():
                arguments = (ray.put(client_app), dict(run_config), num_nodes, folder, faults, fingerprint)
                self._pool = Pool(num_workers, arguments, client_timeout, gpus_per_worker)
        except BaseException:
            self._disconnect()
            raise

    def run(
        self, messages: Sequence[Message], *, release_counts: bool | None, timeout: float | None
    ) -> Iterator[Answers]:
        """As ``Backend.run``."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        with explained():
            summed = release_counts is not None
            round = _Round(self._shares(messages, summed=summed), summed=summed, stack=self._stack)
            spans: list[Span] = []
            while not round.over:
                self._pool.look_after()
                self._send(round, release_counts)
                self._receive(round)
                if time.monotonic() > deadline:
                    self._give_up(round, f"no reply within reply_timeout={timeout:g} s")
                for answers in round.finished():
                    self._kept |= answers.kept
                    spans += answers.spans
                    yield answers
        if spans:
            self._seconds_per_client = sum(span.seconds for span in spans) / len(spans)

    def close(self) -> None:
        """End the workers, and Ray too if it was started here."""
        self._pool.close()
        self._disconnect()
        self._own_folder.cleanup()

    def _shares(self, messages: Sequence[Message], *, summed: bool) -> list[Work]:
        """All work of a round. It may depend on the clock, because the result does not depend on the worker."""
        least, most = 1.0, len(messages) / MIN_SHARES
        if self._seconds_per_client:
            least, in_time = (seconds / self._seconds_per_client for seconds in SHARE_SECONDS)
            most = in_time if summed else min(most, in_time)
        shelf, light = Shelf(), [copy.copy(message) for message in messages]  # the server judges by what it sent
        references = [shelf.split(message) for message in light]
        return [
            Work(start, light[start:end], references[start:end])
            for start, end in shares(len(messages), self._pool.num_workers, self._stack, least, most)
        ]

    def _send(self, round: _Round, release_counts: bool | None) -> None:
        ahead = AHEAD_PER_WORKER * len(self._pool.slots)
        for slot in self._pool.slots:
            while slot.has_room(plenty=round.waiting > PLENTY_PER_WORKER * len(self._pool.slots)):
                work = round.pick(ahead, lambda client, slot=slot: self._home.get(client) is slot)
                if work is None:
                    break
                clients = [_client(message) for message in work.messages]
                since = {client: self._kept[client] for client in clients if client in self._kept}
                answers = slot.actor.answers.remote(
                    slot.calls, work.start, work.messages, work.references, since, release_counts
                )
                slot.add(answers, work)
                self._home |= dict.fromkeys(clients, slot)

    def _receive(self, round: _Round) -> None:
        """Wait a short time for an answer or a worker, and process it."""
        owners = {reference: slot for slot in self._pool.slots for reference, _ in slot.sent}
        if not owners:
            starting = [slot.ready for slot in self._pool.slots if not slot.up]
            if starting:
                ray.wait(starting, timeout=POLL_SECONDS)
            return
        done, _ = ray.wait(list(owners), num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
        for reference in done:
            self._take(owners[reference], round)

    def _take(self, slot: Slot, round: _Round) -> None:
        """Process the oldest answer of a worker: it works in order, and its death fails all its work."""
        try:
            answers: Answers = ray.get(slot.sent[0][0])
        except (RayActorError, OutOfMemoryError) as error:
            self._bury(slot, error, round)
        except RayTaskError as error:
            if isinstance(error.cause, RunError):
                raise error.cause from error
            round.fail(slot.pop(), f"{type(error.cause).__name__}: {error.cause}", tries=1)
        else:
            self._deaths = 0
            worker = self._pool.slots.index(slot) + 1
            answers.spans = [span._replace(worker=worker) for span in answers.spans]
            round.put(slot.pop(), answers)

    def _bury(self, slot: Slot, error: Exception, round: _Round) -> None:
        at_work, *waiting = (work for _, work in slot.sent)
        self._pool.replace(slot)
        round.put_back(waiting)
        reason = "its worker ran out of memory" if isinstance(error, OutOfMemoryError) else "its worker died"
        if slot.late:
            reason = f"no reply within client_timeout={self._client_timeout:g} s"
        log.warning("a worker ended: %s; it had %d clients at work", reason, len(at_work.messages))
        self._deaths += not slot.late
        if self._deaths > MAX_TRIES * len(self._pool.slots) + MORE_DEATHS:
            raise RunError(
                f"workers died {self._deaths} times without a result in between; the last: "
                f"{str(error).splitlines()[0]} If memory is the cause, lower workers or physical_batch_size"
            )
        round.fail(at_work, reason, tries=1 if slot.late else MAX_TRIES)

    def _give_up(self, round: _Round, reason: str) -> None:
        for slot in list(self._pool.slots):
            for _, work in slot.sent:
                round.put_error(work, reason)
            if slot.sent:
                self._pool.replace(slot)
        while (waiting := round.pick(math.inf)) is not None:
            round.put_error(waiting, reason)


def shares(count: int, workers: int, stack: int, least: float, most: float) -> Iterator[tuple[int, int]]:
    """Cut ``count`` messages into runs (start, end): long runs first, short runs last, to end together.

    A run has 1, 2, 4, 8, ... stacks, up to ``most`` messages, and starts at a multiple of its length, so that it covers
    few nodes of ``sums.Tree``.
    """
    start = 0
    while start < count:
        size, wanted = stack, min(most, max(least, (count - start) / (SHARES_PER_WORKER * workers)))
        while 2 * size <= wanted and start % (2 * size) == 0:
            size *= 2
        yield start, min(start + size, count)
        start += size


class _Round:
    """The waiting and the finished work of a round; answers leave in the order of their messages."""

    def __init__(self, work: Sequence[Work], *, summed: bool, stack: int) -> None:
        self._waiting = list(work)
        self._count = sum(len(each.messages) for each in work)
        self._done: dict[int, tuple[int, Answers]] = {}
        self._next = 0
        self._summed, self._stack = summed, stack

    @property
    def over(self) -> bool:
        """Whether all answers have left."""
        return self._next == self._count

    @property
    def waiting(self) -> int:
        """Number of works that no worker has."""
        return len(self._waiting)

    def pick(self, ahead: float, preferred: Any = lambda client: False) -> Work | None:
        """The first work with a ``preferred`` client, or the first; if ``ahead`` answers wait, only the missing one."""
        if not self._waiting:
            return None
        chosen = self._waiting[0]
        if len(self._done) < ahead:
            chosen = next((work for work in self._waiting if preferred(_client(work.messages[0]))), chosen)
        elif chosen.start != self._next:
            return None
        self._waiting.remove(chosen)
        return chosen

    def put_back(self, work: Sequence[Work]) -> None:
        """Return work that no worker has started."""
        self._waiting = sorted([*self._waiting, *work], key=lambda each: each.start)

    def fail(self, work: Work, reason: str, *, tries: int) -> None:
        """Repeat the work of a dead worker in smaller parts, or give an error after ``tries`` tries of one client."""
        if len(work.messages) > 1:
            self.put_back(work.cut(self._stack))
            return
        work.tries += 1
        if work.tries < tries:
            self.put_back([work])
        else:
            self.put_error(work, reason if tries == 1 else f"{reason}, {work.tries} times")

    def put_error(self, work: Work, reason: str) -> None:
        """Give an error for each client of ``work``."""
        self.put(work, unanswered(work.messages, reason, compat.ErrorCode.CLIENT_APP_CRASHED, summed=self._summed))

    def put(self, work: Work, answers: Answers) -> None:
        """Store the answers of ``work``."""
        self._done[work.start] = len(work.messages), answers

    def finished(self) -> Iterator[Answers]:
        """Yield the answers that are next in order."""
        while self._next in self._done:
            count, answers = self._done.pop(self._next)
            self._next += count
            yield answers


def _client(message: Message) -> int:
    return message.metadata.dst_node_id - FIRST_NODE_ID
