"""The Ray actor that runs clients, and the transfer of the model: once per round and node, without a copy."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.flower.grid import FIRST_NODE_ID, Answers
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.simulation.faults import Faults
from fed_dpsat.simulation.host import Host
from fed_dpsat.simulation.state import StateStore
from fed_dpsat.step.gradients import compiled
from fed_dpsat.step.placement import require

References = Mapping[str, "ray.ObjectRef[Any]"]
"""The arrays in the object store of Ray, by the name of the record."""


THREADS = 2
"""The number of calls that a worker may have (``ray_pool.Slot``): the next one starts while an answer is stored."""


class InTurn:
    """Runs numbered calls of several threads one at a time and in order, from 0."""

    def __init__(self) -> None:
        self._condition, self._next = threading.Condition(), 0

    @contextmanager
    def __call__(self, number: int) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._next == number)
            try:
                yield
            finally:
                self._next += 1
                self._condition.notify_all()


class Shelf:
    """Array records in the object store of Ray, each stored once; messages then carry only references."""

    def __init__(self) -> None:
        self._stored: dict[int, tuple[ArrayRecord, Any]] = {}
        self._split: dict[int, tuple[RecordDict, RecordDict, References]] = {}

    def split(self, message: Message) -> References:
        """Remove the array records from ``message``; messages with a common content keep a common content."""
        content = message.content
        if id(content) not in self._split:
            arrays = content.array_records
            light = RecordDict({key: record for key, record in content.items() if key not in arrays})
            self._split[id(content)] = content, light, {key: self._store(record) for key, record in arrays.items()}
        _, message.content, references = self._split[id(content)]
        return references

    def _store(self, record: ArrayRecord) -> Any:
        if id(record) not in self._stored:
            self._stored[id(record)] = record, ray.put({name: compat.view(array) for name, array in record.items()})
        return self._stored[id(record)][1]


@ray.remote
class Worker:
    """A process that runs one client app on messages, one call after the other, in the order of their numbers.

    It has ``THREADS`` threads: while Ray transfers one answer, the next call is at work.
    """

    def __init__(
        self,
        client_app: ClientApp,
        run_config: Mapping[str, Any],
        num_nodes: int,
        state_folder: Path,
        faults: Faults | None,
        fingerprint: str = "",
    ) -> None:
        compat.identify_process()
        self._state_folder, self._device = state_folder, str(run_config.get("device", "cpu"))
        self._kernels = str(run_config.get("kernels", "auto"))
        self._host = Host(client_app, run_config, num_nodes, StateStore(state_folder), faults)
        self._fingerprint = fingerprint
        self._received: dict[Any, ArrayRecord] = {}
        self._turn = InTurn()

    def ready(self) -> tuple[str, bool]:
        """Build the experiment of the client app; returns the host name, and whether it sees the folder of states.

        Raises ``RunError`` if the run needs a GPU and torch sees none, if the kernels do not compile, or if the
        experiment does not match a given ``fingerprint``.
        """
        try:
            require(self._device)
            compiled.decided(self._kernels)
        except SettingError as error:  # another process cannot unpickle it
            raise RunError(f"on {socket.gethostname()}: {error}") from None
        query = Message(
            records.same_content({"sha256": self._fingerprint} if self._fingerprint else {}),
            FIRST_NODE_ID,
            MessageType.QUERY,
        )
        (reply,) = self._host.answers([query], {}, release_counts=None).replies
        if self._fingerprint and reply.has_error():
            raise RunError(f"a worker on {socket.gethostname()}: {reply.error.reason}")
        return socket.gethostname(), self._state_folder.is_dir()

    def answers(
        self,
        number: int,
        start: int,
        messages: Sequence[Message],
        references: Sequence[References],
        since: Mapping[int, int],
        release_counts: bool | None,
    ) -> Answers:
        """``Host.answers`` for messages with the records of ``references`` restored; ``number`` counts calls from 0."""
        with self._turn(number):
            wanted = {reference for each in references for reference in each.values()}
            self._received = {reference: r for reference, r in self._received.items() if reference in wanted}
            for reference in wanted - self._received.keys():
                self._received[reference] = compat.record_of(ray.get(reference))
            whole: dict[int, tuple[RecordDict, RecordDict]] = {}  # messages with a common content keep a common content
            for message, each in zip(messages, references, strict=True):
                light = message.content
                if id(light) not in whole:
                    arrays = {key: self._received[reference] for key, reference in each.items()}
                    whole[id(light)] = light, RecordDict({**light, **arrays})
                message.content = whole[id(light)][1]
            return self._host.answers(messages, since, start=start, release_counts=release_counts)
