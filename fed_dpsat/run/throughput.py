"""Seconds by phase, throughput and traffic of a run."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fed_dpsat.accounting.plans import ClientPlan
from fed_dpsat.client.build import Experiment
from fed_dpsat.run.timing import Phases


class Throughput:
    """Throughput of this process; a resumed run starts from zero."""

    def __init__(self, experiment: Experiment, plans: Sequence[ClientPlan], phases: Phases) -> None:
        self._experiment, self._plans, self._timed = experiment, plans, phases
        self._phases: Counter[str] = Counter()
        self._clients = self._examples = 0.0
        self._bytes: list[tuple[int, int]] = []
        self._messages, self._replies = 0, 0
        self._started = self._round_started = time.perf_counter()

    def of_round(
        self, round: int, asked: list[int], accepted: list[int], bytes_down: int, bytes_up: int
    ) -> dict[str, Any]:
        """Seconds by phase since the last round, and throughput; the next line holds the checkpoint of this round.

        The number of examples is the expected one: the number of sampled examples is not public.
        """
        now = time.perf_counter()
        seconds, self._round_started = now - self._round_started, now
        examples = self._expected_examples(accepted)
        phases = self._timed.take()
        self._phases.update(phases)
        self._clients, self._examples = self._clients + len(accepted), self._examples + examples
        self._bytes += [(bytes_down, bytes_up)] if round else []
        self._messages, self._replies = self._messages + len(asked), self._replies + len(accepted)
        return {
            "round": round,
            "seconds": seconds,
            "phases": phases,
            "bytes_down": bytes_down,
            "bytes_up": bytes_up,
            "clients_per_second": len(accepted) / seconds,
            "examples_per_second": examples / seconds,
            "peak_memory_mb": _peak_memory_mb(),
        }

    def of_run(self) -> dict[str, Any]:
        """The totals of all rounds.

        Bytes are those of parameters as sent: means per round over all clients, and per message to or from one client.
        """
        seconds = time.perf_counter() - self._started
        totals = {way: sum(b[at] for b in self._bytes) for at, way in enumerate(("down", "up")) if self._bytes}
        messages = {"down": self._messages, "up": self._replies}
        return {
            "seconds": seconds,
            "phases": dict(self._phases),
            "bytes_per_round": {way: total / len(self._bytes) for way, total in totals.items()},
            "bytes_per_client": {way: total / messages[way] for way, total in totals.items() if messages[way]},
            "clients_per_second": self._clients / seconds,
            "examples_per_second": self._examples / seconds,
            "peak_memory_mb": _peak_memory_mb(),
        }

    def _expected_examples(self, clients: list[int]) -> float:
        if self._experiment.config.privacy_unit != "example":  # how many examples a client has is not public
            return 0.0
        plans, sizes = self._plans, self._experiment.sizes
        return sum(plans[c].event.steps * plans[c].event.sample_rate * sizes[c] for c in clients)


def _peak_memory_mb() -> float:
    """Peak memory of this process, without its workers."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
