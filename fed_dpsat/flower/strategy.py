"""``PrivateStrategy``: any Flower strategy, with the accounting it cannot forget.

It wraps rather than subclasses. Per round it draws the cohort, charges every client in it, shows the inner
strategy a grid that holds just that cohort, and hands it only the replies that are valid, in the order of
their clients. What the inner strategy does with them is its own business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from numpy.typing import NDArray

from fed_dpsat.cohort import draw_cohort, toss_cohort
from fed_dpsat.experiment import Task
from fed_dpsat.flower import records
from fed_dpsat.flower.nodes import CohortGrid, FederationError, FederationOver, identify_nodes
from fed_dpsat.flower.records import RecordError
from fed_dpsat.params import subtract
from fed_dpsat.plans import ClientPlan, affordable
from fed_dpsat.privacy import epsilon
from fed_dpsat.privacy.ledger import PrivacyLedger

log = getLogger("fed_dpsat")

MAX_FAILED_ROUNDS = 3
"""Rounds in a row in which every client that was asked failed, after which a run ends."""


@dataclass(kw_only=True)
class RoundReport:
    """What came of a round: who was asked, who was dropped and why, who retired with which epsilon."""

    round: int
    asked: list[int]
    accepted: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    retired: dict[int, float] = field(default_factory=dict)
    released: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def kept_model(self) -> bool:
        """No valid reply, so the model stays as it was."""
        return not self.accepted


class PrivateStrategy(Strategy):
    """``inner`` with cohorts, charges and checks around it.

    ``plans`` say what a round costs each client, what it may spend and when it joins. A client is left out once
    ``max_rounds_per_client`` rounds are charged to it, and for good once its next round would exceed its budget:
    both depend on the ledger alone, never on data. Charges are durable before a message is sent and stay, whatever
    becomes of the reply.

    Raises ``FederationOver`` when fewer than ``min_clients`` are left, ``FederationError`` when all asked fail.
    """

    def __init__(
        self,
        inner: Strategy,
        ledger: PrivacyLedger,
        *,
        plans: Sequence[ClientPlan],
        delta: float,
        accountant: str,
        cohort_size: int,
        max_rounds_per_client: int,
        seed: int,
        client_sampling: str = "fixed",
        min_clients: int = 1,
        send_ascent: bool = False,
        release_counts: bool = False,
        join_timeout: float = 60.0,
    ) -> None:
        self.inner = inner
        self.ledger = ledger
        self.plans = plans
        self.delta = delta
        self.accountant = accountant
        self.cohort_size = cohort_size
        self.max_rounds_per_client = max_rounds_per_client
        self.seed = seed
        self.client_sampling = client_sampling
        self.min_clients = min_clients
        self.send_ascent = send_ascent
        self.release_counts = release_counts
        self.join_timeout = join_timeout
        self.report = RoundReport(round=0, asked=[])
        self._rounds_used: dict[int, int] = dict(ledger.rounds_by_client())
        self._arrays = ArrayRecord()
        self._last_arrays: ArrayRecord | None = None
        self._nodes: dict[int, int] = {}
        self._clients: dict[int, int] = {}
        self._failed_rounds = 0
        self.retired: dict[int, int] = {}
        _ask_whole_cohort(inner)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Learn which node holds which partition, then Flower's own loop."""
        self._nodes = identify_nodes(grid, len(self.plans), self.join_timeout)
        self._clients = {node: client for client, node in self._nodes.items()}
        return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort, let the inner strategy address it, charge it, and add the task to each message."""
        self.report = RoundReport(round=server_round, asked=[])
        eligible = self._eligible(server_round)
        if self.client_sampling == "poisson":
            cohort = toss_cohort(self.seed, server_round, eligible, self.cohort_size / len(self.plans))
        else:
            cohort = draw_cohort(self.seed, server_round, eligible, self.cohort_size)
        self._last_arrays, self._arrays = self._arrays or None, arrays
        if not cohort:
            return []
        view = CohortGrid(grid, [self._nodes[c] for c in cohort])
        messages = list(self.inner.configure_train(server_round, arrays, config, view))
        asked = sorted(self._clients.get(m.metadata.dst_node_id, -1) for m in messages)
        if len(set(asked)) != len(asked) or not set(asked) <= set(cohort):
            raise FederationError(
                f"{type(self.inner).__name__} addressed clients {asked} in round {server_round}, where the cohort "
                f"is {cohort}; a strategy asks each node of the grid it is shown at most once"
            )
        self.report.asked = asked
        self.ledger.charge_many(server_round, 0, {client: self.plans[client].event for client in asked})
        for client in asked:
            self._rounds_used[client] = self._rounds_used.get(client, 0) + 1
        ascent = self._ascent_record()
        return [self._with_records(message, server_round, ascent) for message in messages]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Drop what is not valid, by name; the rest goes to the inner strategy in the order of clients."""
        valid: dict[int, Message] = {}
        failures = 0
        for reply in replies:
            failures += reply.has_error()
            self._sort_reply(reply, valid)
        for client in self.report.asked:
            if client not in valid:
                self.report.dropped.setdefault(client, "no reply")
        self.report.accepted = sorted(valid)
        if self.release_counts:
            self.report.released = {
                client: {records.NONFINITE: reply.content[records.METRICS][records.NONFINITE]}
                for client, reply in sorted(valid.items())
            }
        outcomes = dict.fromkeys(valid, "released") | self.report.dropped
        self.ledger.settle_many(server_round, 0, outcomes)
        self._end_if_all_failed(failures)
        if not valid:
            log.warning("round %d: no valid reply, the model stays as it is", server_round)
            return None, None
        arrays, metrics = self.inner.aggregate_train(server_round, [valid[c] for c in sorted(valid)])
        return arrays if arrays is None else self._as_model(arrays), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: metrics on private data do not leave a client."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def summary(self) -> None:
        """The inner strategy's."""
        self.inner.summary()

    def _eligible(self, server_round: int) -> list[int]:
        """Clients that are there, have rounds and budget left; retires those whose next round they cannot afford."""
        for client in sorted(self._nodes.keys() - self.retired.keys()):
            history = self.ledger.history(client)
            if not affordable(history, self.plans[client], self.delta, self.accountant):
                self.retired[client] = server_round
                self.report.retired[client] = epsilon(history, self.delta, self.accountant)
        active = self._nodes.keys() - self.retired.keys()
        if len(active) < self.min_clients:
            raise FederationOver(
                f"{len(active)} clients have budget left before round {server_round}, fewer than "
                f"min_clients={self.min_clients}"
            )
        return [
            c
            for c in active
            if self.plans[c].first_round <= server_round and self._rounds_used.get(c, 0) < self.max_rounds_per_client
        ]

    def _ascent_record(self) -> ArrayRecord | None:
        if not self.send_ascent or self._last_arrays is None:
            return None
        before, now = records.to_params(self._last_arrays), records.to_params(self._arrays)
        return records.to_arrays(subtract(before, now))

    def _with_records(self, message: Message, server_round: int, ascent: ArrayRecord | None) -> Message:
        """``message`` with a content of its own: stock strategies let all messages of a round share one."""
        event = self.plans[self._clients[message.metadata.dst_node_id]].event
        task = Task(
            round=server_round,
            noise_multiplier=event.noise_multiplier,
            sample_rate=event.sample_rate,
            local_steps=event.steps,
        )
        content = RecordDict({**message.content, records.TASK: records.task_record(task)})
        if ascent is not None:
            content[records.ASCENT] = ascent
        message.content = content
        return message

    def _sort_reply(self, reply: Message, valid: dict[int, Message]) -> None:
        client = self._clients.get(reply.metadata.src_node_id)
        if client is None:
            self.report.unexpected.append(f"node {reply.metadata.src_node_id} is no known client")
            return
        if client not in self.report.asked:
            self.report.unexpected.append(f"client {client} was not asked")
            return
        if client in valid or client in self.report.dropped:
            self.report.unexpected.append(f"client {client} replied again")
            return
        try:
            self._check_reply(client, reply)
        except RecordError as error:
            self.report.dropped[client] = str(error)
            log.warning("round %d: client %d dropped: %s", self.report.round, client, error)
        else:
            valid[client] = reply

    def _check_reply(self, client: int, reply: Message) -> None:
        if reply.has_error():
            raise RecordError(f"failed: {reply.error.reason}")
        said_client, said_round, attempt, event = records.read_event(reply.content)
        if (said_client, said_round, attempt) != (client, self.report.round, 0):
            raise RecordError(
                f"says client {said_client}, round {said_round}, attempt {attempt}; "
                f"asked was client {client}, round {self.report.round}, attempt 0"
            )
        if event != self.plans[client].event:
            raise RecordError(f"its event {event} is not the one that was charged, {self.plans[client].event}")
        records.check_metrics(reply.content, release_counts=self.release_counts)
        records.check_arrays(reply.content, self._arrays)

    def _as_model(self, arrays: ArrayRecord) -> ArrayRecord:
        """``arrays`` in the model's types (some stock strategies return float64); wrong or not finite is an error."""
        if arrays.keys() != self._arrays.keys():
            raise FederationError(f"{type(self.inner).__name__} returned {list(arrays)}, not {list(self._arrays)}")
        model = ArrayRecord({k: Array(_cast(a.numpy(), self._arrays[k].dtype)) for k, a in arrays.items()})
        try:
            records.check_arrays(RecordDict({records.ARRAYS: model}), self._arrays)
        except RecordError as error:
            raise FederationError(f"{type(self.inner).__name__} returned a model that is none: {error}") from error
        return model

    def _end_if_all_failed(self, failures: int) -> None:
        asked = self.report.asked
        self._failed_rounds = self._failed_rounds + 1 if asked and failures >= len(asked) else 0
        if self._failed_rounds and (len(asked) == len(self.plans) or self._failed_rounds == MAX_FAILED_ROUNDS):
            reason = next(iter(self.report.dropped.values()))
            raise FederationError(
                f"every client that was asked failed, {self._failed_rounds} round(s) in a row until round "
                f"{self.report.round}; the first said: {reason}"
            )


def _ask_whole_cohort(inner: Strategy) -> None:
    """A stock strategy samples by fraction and waits for a minimum; the cohort is drawn here, so it takes all."""
    if isinstance(inner, FedAvg):
        inner.fraction_train, inner.fraction_evaluate = 1.0, 0.0
        inner.min_train_nodes = inner.min_available_nodes = 1
        inner.min_evaluate_nodes = 0


def _cast(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """``array`` as ``dtype``; whole numbers are rounded, since a weighted mean of 17s may be 16.999."""
    whole = np.issubdtype(np.dtype(dtype), np.integer)
    return np.asarray(np.rint(array) if whole else array, dtype=dtype)
