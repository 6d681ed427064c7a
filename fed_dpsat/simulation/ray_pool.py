"""A pool of Ray workers: start them, admit them when they are up, replace them when they die."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from flwr.app import Message
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from fed_dpsat.errors import RunError
from fed_dpsat.simulation.ray_worker import THREADS, References, Worker

log = logging.getLogger("fed_dpsat")

QUICK_SECONDS = 0.2
"""A worker with shorter work gets its next work early, which hides the time of a message."""
START_TIMEOUT = 50.0
"""A run ends after this many seconds without a worker."""
IMPORT_TIMEOUT = 250.0
"""Additional seconds for workers that have a CPU: imports can take minutes on a busy machine."""
AT_ONCE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Workers that start together: each imports torch, and thirty on two cores take more than a minute."""


@dataclass
class Work:
    """Messages of a round from position ``start`` on."""

    start: int
    messages: Sequence[Message]
    references: Sequence[References]
    tries: int = 0

    def cut(self, stack: int) -> list[Work]:
        """The work as one part per stack of clients; a single stack as one part per message."""
        size = stack if len(self.messages) > stack else 1
        return [
            Work(self.start + i, self.messages[i : i + size], self.references[i : i + size])
            for i in range(0, len(self.messages), size)
        ]


@dataclass
class Slot:
    """A worker: its actor, its work in order (``sent``), and the start of the oldest (``since``).

    ``calls`` counts all work that it received.
    """

    actor: Any
    ready: Any
    up: bool = False
    since: float = field(default_factory=time.monotonic)
    sent: deque[tuple[Any, Work]] = field(default_factory=deque)
    quick: bool = False
    late: bool = False
    calls: int = 0

    def has_room(self, *, plenty: bool) -> bool:
        """Whether the worker may get work: if it is idle, or has one quick work.

        Work waits behind slow work only if there is ``plenty`` for the other workers.
        """
        return self.up and not self.late and len(self.sent) < (2 if self.quick or plenty else 1)

    def add(self, reference: Any, work: Work) -> None:
        """Record that the worker has ``work``; ``reference`` will hold its answer."""
        if not self.sent:
            self.since = time.monotonic()
        self.sent.append((reference, work))
        self.calls += 1

    def pop(self) -> Work:
        """Remove and return the oldest work, which has ended."""
        self.quick = time.monotonic() - self.since < QUICK_SECONDS
        self.since = time.monotonic()
        return self.sent.popleft()[1]


class Pool:
    """``num_workers`` workers made from ``arguments``, with one CPU and ``gpus_per_worker`` GPUs each.

    ``AT_ONCE`` workers start together, and work starts with the first. Raises ``RunError`` if none gets a CPU within a
    minute, or none starts within five.
    """

    def __init__(
        self, num_workers: int, arguments: tuple[Any, ...], client_timeout: float, gpus_per_worker: float = 0.0
    ) -> None:
        self._arguments, self._client_timeout, self._gpus_per_worker = arguments, client_timeout, gpus_per_worker
        self.num_workers, self._last_seen = num_workers, time.monotonic()
        self.slots: list[Slot] = []
        self._free = _free_cpus()
        self._start_more()
        self._wait_for_one()

    def look_after(self) -> None:
        """Admit workers that are up, and kill those whose oldest work takes too long.

        Raises ``RunError`` if no worker is left and none starts, or if one does not see the states of clients.
        """
        starting = [slot.ready for slot in self.slots if not slot.up]
        done = set(ray.wait(starting, num_returns=len(starting), timeout=0)[0]) if starting else set()
        for slot in list(self.slots):
            if slot.ready in done:
                self._take_in(slot)
            limit = self._client_timeout * len(slot.sent[0][1].messages) if slot.sent else 0.0
            if limit and not slot.late and time.monotonic() - slot.since > limit:
                slot.late = True
                ray.kill(slot.actor)
        self._start_more()
        if any(slot.up for slot in self.slots):
            self._last_seen = time.monotonic()
        elif time.monotonic() - self._last_seen > START_TIMEOUT:
            raise RunError(f"no Ray worker is left, and none started within {START_TIMEOUT:g} s; see the logs of Ray")

    def replace(self, slot: Slot) -> None:
        """Kill a worker and start another in its place."""
        ray.kill(slot.actor)
        self.slots[self.slots.index(slot)] = self._new_slot()

    def close(self) -> None:
        """Kill all workers."""
        for slot in self.slots:
            ray.kill(slot.actor)
        self.slots = []

    def _start_more(self) -> None:
        starting = sum(not slot.up for slot in self.slots)
        more = min(self.num_workers - len(self.slots), AT_ONCE - starting)
        self.slots += [self._new_slot() for _ in range(more)]

    def _new_slot(self) -> Slot:
        options = Worker.options(  # type: ignore[attr-defined]
            num_cpus=1,
            num_gpus=self._gpus_per_worker,
            max_restarts=0,
            max_concurrency=THREADS,
            scheduling_strategy="SPREAD",
        )
        actor = options.remote(*self._arguments)
        return Slot(actor, actor.ready.remote())

    def _wait_for_one(self) -> None:
        many = f"workers={self.num_workers}"
        if self._gpus_per_worker:
            many += f", gpus_per_worker={self._gpus_per_worker:g}"
        waiting, began = [slot.ready for slot in self.slots], time.monotonic()
        ready, _ = ray.wait(waiting, timeout=START_TIMEOUT)
        if not ready and _free_cpus() < self._free:  # a worker has a CPU and is starting
            ready, _ = ray.wait(waiting, timeout=IMPORT_TIMEOUT)
        if not ready:
            free = ray.available_resources()  # type: ignore[no-untyped-call]
            kinds = ("CPU", "GPU") if self._gpus_per_worker else ("CPU",)
            there = " and ".join(f"{free.get(kind, 0):g} {kind}s" for kind in kinds)
            self.close()
            waited = time.monotonic() - began
            raise RunError(
                f"{many}: no Ray worker within {waited:.0f} s; {there} are free: free some, lower "
                f"{'gpus_per_worker or ' if self._gpus_per_worker else ''}workers, or set workers=0"
            )
        try:
            ray.get(ready[0], timeout=START_TIMEOUT)
        except (RayActorError, GetTimeoutError) as error:
            self.close()
            raise RunError(
                f"{many}: a Ray worker does not start ({str(error).splitlines()[0]}); see the logs of Ray, or set "
                "workers=0"
            ) from error
        except RayTaskError:  # an error of the worker itself, which is up and would keep its CPU
            self.close()
            raise

    def _take_in(self, slot: Slot) -> None:
        try:
            host, sees_states = ray.get(slot.ready)
        except (OutOfMemoryError, RayActorError) as error:
            log.warning("a worker did not start: %s", str(error).splitlines()[0])
            self.replace(slot)
            return
        if not sees_states:
            raise RunError(
                f"the worker on {host} does not see the states of clients; put the run folder on a disk that all "
                "hosts share"
            )
        slot.up = True


def _free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
