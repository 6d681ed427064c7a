"""Ray workers that are there: started, taken in when they are up, replaced when they are gone."""

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
"""Work that takes less has its successor waiting at the worker, so that the way there costs nothing."""
START_TIMEOUT = 50.0
"""Seconds without a worker after which a run ends."""
IMPORT_TIMEOUT = 250.0
"""More seconds for workers that have their CPU: on a busy machine, imports alone take minutes."""
AT_ONCE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Workers that start at a time: each imports torch, and of thirty at once on two cores none is there in a minute."""


@dataclass
class Work:
    """Some messages of a round, from number ``start`` on."""

    start: int
    messages: Sequence[Message]
    references: Sequence[References]
    tries: int = 0

    def cut(self, stack: int) -> list[Work]:
        """Its stacks of clients that train together, in one piece each; of a single stack, each message by itself."""
        size = stack if len(self.messages) > stack else 1
        return [
            Work(self.start + i, self.messages[i : i + size], self.references[i : i + size])
            for i in range(0, len(self.messages), size)
        ]


@dataclass
class Slot:
    """A worker's place: its actor, what was sent to it, oldest first, and since when the oldest is at work.

    ``calls`` is how often something was sent.
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
        """Work may be sent: to who is idle, or who will soon be.

        Behind a slow client it would wait for nothing; unless there is ``plenty`` for the others to do meanwhile.
        """
        return self.up and not self.late and len(self.sent) < (2 if self.quick or plenty else 1)

    def add(self, reference: Any, work: Work) -> None:
        """``work`` was sent, and ``reference`` will hold what comes of it."""
        if not self.sent:
            self.since = time.monotonic()
        self.sent.append((reference, work))
        self.calls += 1

    def pop(self) -> Work:
        """The oldest work, which is done; the next one begins."""
        self.quick = time.monotonic() - self.since < QUICK_SECONDS
        self.since = time.monotonic()
        return self.sent.popleft()[1]


class Pool:
    """``num_workers`` workers made of ``arguments``, of one CPU and ``gpus_per_worker`` cards each.

    A few start at a time (``AT_ONCE``), and work begins with the first. Raises ``RunError`` if none has a CPU within a
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
        """Take in workers that are up, and kill those whose oldest work takes too long.

        Raises ``RunError`` where no worker is left and none starts, or one does not see the clients' states.
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
            raise RunError(f"no Ray worker is left, and none has started within {START_TIMEOUT:g} s; see Ray's logs")

    def replace(self, slot: Slot) -> None:
        """A new worker in the place of one that is gone, or is to go."""
        ray.kill(slot.actor)
        self.slots[self.slots.index(slot)] = self._new_slot()

    def close(self) -> None:
        """End all."""
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
        if not ready and _free_cpus() < self._free:  # a worker has taken one
            ready, _ = ray.wait(waiting, timeout=IMPORT_TIMEOUT)
        if not ready:
            free = ray.available_resources()  # type: ignore[no-untyped-call]
            kinds = ("CPU", "GPU") if self._gpus_per_worker else ("CPU",)
            there = " and ".join(f"{free.get(kind, 0):g} {kind}s" for kind in kinds)
            self.close()
            waited = time.monotonic() - began
            raise RunError(
                f"{many}: no Ray worker within {waited:.0f} s, where {there} are free; free some, lower "
                f"{'gpus_per_worker or ' if self._gpus_per_worker else ''}workers, or set workers=0"
            )
        try:
            ray.get(ready[0], timeout=START_TIMEOUT)
        except (RayActorError, GetTimeoutError) as error:
            self.close()
            raise RunError(
                f"{many}: a Ray worker does not start ({str(error).splitlines()[0]}); see Ray's logs, or set workers=0"
            ) from error
        except RayTaskError:  # the worker's own words: it is up, and would keep its CPU
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
                f"the worker on {host} does not see the clients' states; put the run folder where all hosts see it"
            )
        slot.up = True


def _free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
