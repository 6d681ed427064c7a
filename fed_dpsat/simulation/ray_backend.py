"""Clients on Ray workers: the model goes out once per round, few messages are in flight, the dead are replaced.

A worker is an actor in a process of its own that keeps the client app, and with it model and data. A node's
context is an object in Ray's store: it goes from worker to worker without passing through the driver.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from fed_dpsat.errors import RunError
from fed_dpsat.flower import compat
from fed_dpsat.flower.grid import answer, error_reply, node_context

log = logging.getLogger("fed_dpsat")

IN_FLIGHT_PER_WORKER = 2
"""One message trains while the next one waits at the worker."""
MAX_TRIES = 2
START_TIMEOUT = 60.0

SharedArrays = list[tuple[str, "ray.ObjectRef[Any]"]]


@ray.remote
class Worker:
    """A process that answers messages with one client app."""

    def __init__(self, client_app: ClientApp) -> None:
        self._client_app = client_app
        self._received: dict[Any, ArrayRecord] = {}
        compat.identify_process()

    def ready(self) -> bool:
        """Return when the process is up."""
        return True

    def answer(self, message: Message, shared: SharedArrays, context: Context) -> tuple[Message, Context]:
        """The reply to ``message`` with the ``shared`` records put back in, and the context after it."""
        refs = dict(shared)
        self._received = {ref: record for ref, record in self._received.items() if ref in refs.values()}
        for ref in refs.values():
            if ref not in self._received:
                self._received[ref] = ArrayRecord({k: Array(a) for k, a in ray.get(ref).items()})
        message.content = RecordDict({**message.content, **{k: self._received[ref] for k, ref in refs.items()}})
        return answer(self._client_app, message, context), context


@dataclass
class _Call:
    message: Message
    shared: SharedArrays
    context: Any
    worker: int
    tries: int = 1


class RayBackend:
    """``num_workers`` processes with one CPU each; a Ray that already runs is joined and left running.

    A worker that dies is replaced, and its clients are tried once more with the same message and context: the same
    bits if noise is seeded. What the dead worker had computed was never released, so one charge is right either way.

    Raises ``RunError`` if no worker starts within a minute.
    """

    def __init__(self, client_app: ClientApp, run_config: Mapping[str, Any], num_nodes: int, num_workers: int) -> None:
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(num_cpus=num_workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        self._app = ray.put(client_app)
        self._run_config, self._num_nodes = run_config, num_nodes
        self._contexts: dict[int, Any] = {}
        self._workers = [self._new_worker() for _ in range(num_workers)]
        try:
            ray.get([worker.ready.remote() for worker in self._workers], timeout=START_TIMEOUT)
        except (GetTimeoutError, RayActorError) as error:
            self.close()
            raise RunError(
                f"workers={num_workers}: no Ray worker pool within {START_TIMEOUT:g} s ({error}); "
                "free CPUs, lower workers, or set workers=0"
            ) from error

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        """One reply per message, in the order in which they are done."""
        waiting = list(reversed(messages))
        shared: dict[int, Any] = {}
        calls: dict[Any, _Call] = {}
        free = list(range(len(self._workers))) * IN_FLIGHT_PER_WORKER
        while waiting or calls:
            while waiting and free:
                message = waiting.pop()
                light, refs = self._split(message, shared)
                node = message.metadata.dst_node_id
                context = self._contexts.get(node) or node_context(node, self._run_config, self._num_nodes)
                self._send(_Call(light, refs, context, free.pop(0)), calls)
            done, _ = ray.wait(list(calls), num_returns=1, fetch_local=False)
            call = calls.pop(done[0])
            reply = self._collect(done[0], call, calls)
            if reply is not None:
                free.append(call.worker)
                yield reply

    def close(self) -> None:
        """End the workers, and Ray too if it was started here."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers, self._contexts = [], {}
        if self._owns_ray:
            ray.shutdown()

    def _new_worker(self) -> Any:
        return Worker.options(num_cpus=1, max_restarts=0).remote(self._app)  # type: ignore[attr-defined]

    def _split(self, message: Message, shared: dict[int, Any]) -> tuple[Message, SharedArrays]:
        """The message without its array records, and those as references: the same record is stored once."""
        refs: SharedArrays = []
        for key, record in message.content.array_records.items():
            if id(record) not in shared:
                shared[id(record)] = ray.put({k: array.numpy() for k, array in record.items()})
            refs.append((key, shared[id(record)]))
        message.content = RecordDict({k: v for k, v in message.content.items() if not isinstance(v, ArrayRecord)})
        return message, refs

    def _send(self, call: _Call, calls: dict[Any, _Call]) -> None:
        method = self._workers[call.worker].answer.options(num_returns=2)
        reply, context = method.remote(call.message, call.shared, call.context)
        calls[reply] = call
        self._contexts[call.message.metadata.dst_node_id] = context

    def _collect(self, ref: Any, call: _Call, calls: dict[Any, _Call]) -> Message | None:
        """The reply behind ``ref``; None if its worker died and the client is being tried again."""
        node = call.message.metadata.dst_node_id
        try:
            reply: Message = ray.get(ref)
        except RayActorError:
            self._contexts[node] = call.context
            self._replace_if_dead(call.worker)
            if call.tries < MAX_TRIES:
                log.warning("worker %d died; node %d is tried again", call.worker, node)
                call.tries += 1
                self._send(call, calls)
                return None
            return error_reply(call.message, "its worker died twice", compat.ErrorCode.NODE_UNAVAILABLE)
        except RayTaskError as error:
            self._contexts[node] = call.context
            return error_reply(call.message, str(error.cause), compat.ErrorCode.CLIENT_APP_CRASHED)
        return reply

    def _replace_if_dead(self, index: int) -> None:
        try:
            ray.get(self._workers[index].ready.remote(), timeout=START_TIMEOUT)
        except (RayActorError, GetTimeoutError):
            self._workers[index] = self._new_worker()
