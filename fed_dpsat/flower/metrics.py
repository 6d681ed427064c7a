"""The metrics of a server: what its run folder and its ledger hold, as numbers for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from statistics import median
from typing import Any

from fed_dpsat.flower.strategy import PrivateStrategy
from fed_dpsat.run.metrics import Metrics
from fed_dpsat.settings.config import RunConfig

VERDICTS = ("accepted", "absent", "failed", "invalid")


class ServerMetrics:
    """Metrics of one run; each has the prefix ``fed_dpsat_``. Raises the errors of ``Metrics``."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self._served = config, Metrics(config.metrics_port)
        gauge, counter = self._served.gauge, self._served.counter
        self._clients = gauge("fed_dpsat_clients", "Clients of the run.")
        self._connected = gauge("fed_dpsat_clients_connected", "Clients connected at the last round.")
        self._retired = gauge("fed_dpsat_clients_retired", "Clients whose budget pays for no further round.")
        self._planned = gauge("fed_dpsat_rounds_planned", "Rounds of the run: num_rounds.")
        self._round = gauge("fed_dpsat_round", "The last complete round.")
        self._ended = gauge("fed_dpsat_round_end_timestamp_seconds", "Unix time of the end of the last round.")
        self._seconds = counter("fed_dpsat_round_seconds_total", "Seconds of all rounds.")
        self._rounds = counter("fed_dpsat_rounds_total", "Rounds since this process started.")
        self._replies = counter("fed_dpsat_replies_total", "Clients asked, by the verdict on the reply.", ("verdict",))
        self._epsilon = gauge("fed_dpsat_epsilon", "Epsilon charged in the ledger, over clients.", ("over_clients",))
        self._clients.set(config.num_clients)
        self._planned.set(config.num_rounds)
        for verdict in VERDICTS:
            self._replies.labels(verdict)

    def after_round(self, strategy: PrivateStrategy, timing: Mapping[str, Any]) -> None:
        """Add the last round of ``strategy``, with its line of ``timing.jsonl``."""
        report, config = strategy.report, self.config
        self._connected.set(len(strategy.connected))
        self._retired.set(len(strategy.retired))
        self._round.set(report.round)
        self._ended.set(time.time())
        spent = strategy.ledger.epsilon_by_client(config.delta, config.accountant)
        values = [spent.get(client, 0.0) for client in range(config.num_clients)]
        self._epsilon.labels("max").set(max(values))
        self._epsilon.labels("median").set(median(values))
        if report.round:  # line 0 is an evaluation before the first round
            self._rounds.inc()
            self._seconds.inc(timing["seconds"])
        self._replies.labels("accepted").inc(len(report.accepted))
        for client in report.dropped:
            failure = report.at_fault.get(client)
            self._replies.labels(failure.kind if failure else "absent").inc()

    def close(self) -> None:
        """Serve no longer."""
        self._served.close()


@contextmanager
def serving(config: RunConfig) -> Iterator[ServerMetrics | None]:
    """The metrics of a run with a ``metrics_port``, during the block; None without one."""
    if not config.metrics_port:
        yield None
        return
    with closing(ServerMetrics(config)) as metrics:
        yield metrics
