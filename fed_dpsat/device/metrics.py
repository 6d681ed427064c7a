"""The metrics of a device. None is made of its examples: what they say follows from messages and the ledger alone.

The number of examples, losses, gradients, and seconds of a step (which depend on the drawn batches) are not among them.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from fed_dpsat.accounting import PrivacyLedger, epsilon
from fed_dpsat.device.policy import Policy
from fed_dpsat.device.release import ACCOUNTANT, CLIENT, ledger_path
from fed_dpsat.run.metrics import Metrics

REQUESTS, OUTCOMES = ("identity", "round"), ("answered", "refused", "failed")

BUDGET = {
    "fed_dpsat_device_epsilon_spent": "Epsilon charged in the ledger, at largest_delta (PLD).",
    "fed_dpsat_device_epsilon_budget": "largest_epsilon of the policy.",
    "fed_dpsat_device_epsilon_left": "The rest of the budget.",
    "fed_dpsat_device_rounds_charged": "Rounds in the ledger, over all runs.",
}


def read_budget(policy: Policy) -> tuple[float, float, float, float]:
    """The values of ``BUDGET``, as the ledger has them now. Raises ``LedgerError``."""
    with PrivacyLedger(ledger_path(Path(policy.folder)), readonly=True) as ledger:
        spent = epsilon(ledger.history(CLIENT), policy.largest_delta, ACCOUNTANT)
        rounds = ledger.rounds_by_client().get(CLIENT, 0)
    return spent, policy.largest_epsilon, max(policy.largest_epsilon - spent, 0.0), rounds


class DeviceMetrics:
    """Metrics of one device; each has the prefix ``fed_dpsat_device_``. Raises the errors of ``Metrics``."""

    def __init__(self, policy: Policy) -> None:
        self._served = Metrics(policy.metrics_port)
        gauge, counter = self._served.gauge, self._served.counter
        self.joined = gauge("fed_dpsat_device_joined", "1 once the server has admitted the device, 0 while it waits.")
        self._asked = counter("fed_dpsat_device_requests_total", "Requests by outcome.", ("request", "outcome"))
        self._last = gauge("fed_dpsat_device_request_timestamp_seconds", "Unix time of the last request.")
        for request in REQUESTS:
            for outcome in OUTCOMES:
                self._asked.labels(request, outcome)
        self._served.at_scrape(BUDGET, partial(read_budget, policy))

    def count(self, request: str, outcome: str) -> None:
        """Add a request of ``REQUESTS`` with an outcome of ``OUTCOMES``."""
        self._asked.labels(request, outcome).inc()
        self._last.set(time.time())

    def close(self) -> None:
        """Serve no longer."""
        self._served.close()


_of_process: list[DeviceMetrics] = []


def serve(policy: Policy) -> DeviceMetrics | None:
    """Start the metrics of this process if the policy has a ``metrics_port``. Raises the errors of ``Metrics``."""
    _of_process[:] = [DeviceMetrics(policy)] if policy.metrics_port else []
    return _of_process[0] if _of_process else None


def served() -> DeviceMetrics | None:
    """The metrics that this process serves, if any."""
    return _of_process[0] if _of_process else None
