"""``PrivateStrategy``: any Flower strategy, with the accounting it cannot forget.

It wraps rather than subclasses. Per round it draws the cohort, charges every client in it, shows the inner
strategy a grid that holds just that cohort, and hands it only the replies that are valid, in the order of
their clients; or one reply that is their mean, if that is all it uses (``sums``). What it does with them is its own
business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import getLogger

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fed_dpsat.errors import SettingError
from fed_dpsat.experiment import Task
from fed_dpsat.flower import buffered, codec, records, sums
from fed_dpsat.flower.buffered import Buffer
from fed_dpsat.flower.client_release import ClientRelease
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.handover import Handover, ask_whole_cohort
from fed_dpsat.flower.nodes import CohortGrid, Directory, FederationError
from fed_dpsat.flower.replies import Failure, judge
from fed_dpsat.flower.report import RoundReport, Verdicts, by_attempt
from fed_dpsat.flower.roster import Roster
from fed_dpsat.flower.secure_server import secure_sum
from fed_dpsat.flower.strategy_state import Plain, capture_state, restore_state
from fed_dpsat.params import subtract
from fed_dpsat.plans import ClientPlan
from fed_dpsat.privacy import epsilon
from fed_dpsat.privacy.event import History
from fed_dpsat.privacy.ledger import PrivacyLedger
from fed_dpsat.process import intra_op_threads
from fed_dpsat.subspace import Coordinates, Span
from fed_dpsat.timing import Phases

log = getLogger("fed_dpsat")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
BeforeRound = Callable[[int, ArrayRecord], ArrayRecord]
"""The model that a round starts from, of the one after the last round: layers may join."""

Within = Callable[[int], Coordinates | Span | None]
"""A round, from 1, to what it can change: replies are then the numbers of that subspace; None is whole models."""


class PrivateStrategy(Strategy):
    """``inner`` with cohorts, charges and checks around it.

    ``plans`` say what a round costs each client, what it may spend and when it joins. A client is left out once
    ``max_rounds_per_client`` rounds are charged to it, and for good once its next round would exceed its budget:
    both depend on the ledger alone, never on data. Charges are durable before a message is sent and stay, whatever
    becomes of the reply. With a ``release`` the unit is one client: replies are bounded, added up and noised here, also
    where there are none, and the inner strategy sees what comes of it.

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
        secure_threshold: float = 0.0,
        release: ClientRelease | None = None,
        buffer: Buffer | None = None,
        phases: Phases | None = None,
        within: Within = lambda round: None,
    ) -> None:
        self.inner = inner
        self.ledger = ledger
        self.plans = plans
        self.delta = delta
        self.accountant = accountant
        self.send_ascent = send_ascent
        self.release_counts = release_counts
        self.secure_threshold = secure_threshold
        self.release = release
        self.buffer = buffer
        if (secure_threshold or release) and not sums.only_mean(inner):
            raise SettingError(
                "strategy",
                type(inner).__name__,
                "one that uses only the mean of replies",
                "privacy_unit=client releases nothing else" if release else "secure_aggregation hides them",
            )
        self.phases = phases or Phases()
        self._within = within
        self.report = RoundReport(round=0)
        self.roster = Roster(
            plans,
            ledger,
            delta=delta,
            accountant=accountant,
            cohort_size=cohort_size,
            max_rounds_per_client=max_rounds_per_client,
            seed=seed,
            client_sampling=client_sampling,
            min_clients=min_clients,
            secret_coins=release is not None and release.noise_source == "system",
        )
        self._tasks: dict[int, Task] = {}
        self._charged: dict[int, Task] = {}
        self._sent: dict[int, Message] = {}
        self._attempts: dict[int, int] = {}
        self._arrays = ArrayRecord()
        self._last_arrays: ArrayRecord | None = None
        self._directory = Directory(len(plans), join_timeout)
        self._failed_rounds = 0
        self._simulated_seconds = 0.0
        ask_whole_cohort(inner)

    @property
    def retired(self) -> dict[int, int]:
        """Clients that could not afford another round, with the round before which they left."""
        return self.roster.retired

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        *,
        done: int | None = None,
        before_round: BeforeRound | None = None,
    ) -> Result:
        """Learn which node holds which partition; then Flower's loop, after the rounds that are ``done``.

        ``evaluate_fn`` is called after each round and, where nothing is done, before the first. Nobody else is asked
        to evaluate.
        """
        if self.buffer and not (isinstance(grid, SimulationGrid) and grid.seconds):
            raise FederationError("buffer_size needs simulated delays, and no network; set it to 0 on a network")
        self.meet(grid)
        config, result = train_config or ConfigRecord(), Result()
        result.arrays = initial_arrays
        if evaluate_fn and done is None:
            evaluate_fn(0, initial_arrays)
        for round in range((done or 0) + 1, num_rounds + 1):
            if before_round:
                result.arrays = before_round(round, result.arrays)
            with self.phases("send"):
                messages = list(self.configure_train(round, result.arrays, config, grid))
            arrays, metrics = self._train(round, messages, grid, timeout)
            result.arrays = arrays or result.arrays
            if metrics is not None:
                result.train_metrics_clientapp[round] = metrics
            if evaluate_fn and (measured := evaluate_fn(round, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[round] = measured
        return result

    def renew(self, inner: Strategy) -> None:
        """Go on with another inner strategy, or the same one from its beginning."""
        self.inner = inner
        ask_whole_cohort(inner)

    def meet(self, grid: Grid) -> None:
        """Learn which node holds which partition; a simulation knows."""
        self._directory.meet(grid)
        self.roster.join(self._directory.nodes)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort, let the inner strategy address it, charge it, and add the task to each message."""
        self.report, self._tasks, self._charged, self._sent = RoundReport(round=server_round), {}, {}, {}
        self._directory.look_again(grid, self.roster.min_clients)
        self.roster.join(self._directory.nodes)
        cohort, retiring = self._cohort(server_round, grid)
        self.report.retired = {c: epsilon(spent, self.delta, self.accountant) for c, spent in retiring.items()}
        self._last_arrays, self._arrays = self._arrays or None, arrays
        if not cohort and self.release is None:
            return []
        shown = cohort or list(self._directory.nodes)[:1]  # of a round with nobody in it a strategy learns the model
        view = CohortGrid(grid, [self._directory.nodes[c] for c in shown])
        messages = list(self.inner.configure_train(server_round, arrays, config, view)) if shown else []
        messages = messages if cohort else []
        by_client = {self._directory.client_at(message.metadata.dst_node_id): message for message in messages}
        if len(by_client) < len(messages) or not by_client.keys() <= set(cohort):
            raise FederationError(
                f"{type(self.inner).__name__} addressed nodes {[m.metadata.dst_node_id for m in messages]} in round "
                f"{server_round}, where the cohort is {cohort}; a strategy asks each node of the grid it is shown "
                "at most once"
            )
        self.report.asked = asked = [client for client in cohort if client in by_client]
        everyone = self.release is not None and self.release.every_client
        costs = self.roster.population(server_round) if everyone else asked
        self._charged = {client: self._task(client, server_round) for client in costs}
        self._tasks = {client: self._charged[client] for client in asked}
        for attempt, events in by_attempt(self._charged):
            self.ledger.charge_many(server_round, attempt, events)
        self.roster.charged(costs)
        self._attempts = {}
        self._sent = {client: by_client[client] for client in asked}
        self._add_records(self._sent)
        self.report.bytes_down = sum(codec.num_bytes(message.content) for message in self._sent.values())
        return list(self._sent.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Drop what is not valid, by name; the rest goes to the inner strategy in the order of clients."""
        valid, verdicts = self._judged(replies)
        if not valid and self.release is None:
            return self._keep_model()
        return self._handover().all(self.report.asked, valid, verdicts)

    def aggregate_parts(
        self, server_round: int, parts: Iterable[sums.Part]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """``aggregate_train`` of replies that were judged and added up where they were made."""
        with intra_op_threads(1):  # threads that wait for each other cost more than they add
            total = sums.merge(parts)
        self._note({**total.accepted, **total.failed})
        return self._handover().mean(total) if total.accepted or self.release else self._keep_model()

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

    def state_dict(self) -> dict[str, Plain]:
        """What a checkpoint needs to go on after this round; raises ``StrategyStateError``."""
        return {
            "retired": dict(self.retired),
            "failed_rounds": self._failed_rounds,
            "simulated_seconds": self._simulated_seconds,
            "sent": records.to_params(self._arrays) if self.send_ascent else {},
            "inner": capture_state(self.inner),
            **({"buffer": self.buffer.state_dict()} if self.buffer else {}),
        }

    def load_state_dict(self, state: Mapping[str, Plain], *, next_round: int, same_noise: bool) -> None:
        """Go on with ``next_round``. What was charged of it is done again.

        With the ``same_noise`` (seeded), that is the same release, and no second charge. Else it is another attempt,
        with a charge of its own.
        """
        self.roster.begin_again(next_round, state["retired"], same_noise=same_noise)
        self._failed_rounds = state["failed_rounds"]
        self._simulated_seconds = state["simulated_seconds"]
        self._arrays = records.to_arrays(state["sent"])
        self._attempts = {} if same_noise else {c: last + 1 for c, last in self.ledger.attempts(next_round).items()}
        restore_state(self.inner, state["inner"])
        if self.buffer:
            self.buffer.load_state_dict(state["buffer"])

    def _cohort(self, round: int, grid: Grid) -> tuple[list[int], dict[int, History]]:
        if self.buffer is None:
            return self.roster.cohort(round)
        assert isinstance(grid, SimulationGrid)
        assert grid.seconds
        eligible, retiring = self.roster.eligible(round)
        return self.buffer.set_out(round, eligible, grid.seconds), retiring

    def _pass_time(self, round: int, grid: Grid) -> None:
        """A round takes, in simulated time, as long as its slowest client; or until its buffer is full."""
        if isinstance(grid, SimulationGrid) and grid.seconds:
            slowest = max((grid.seconds(client, round) for client in self.report.asked), default=0.0)
            self._simulated_seconds = self.buffer.now if self.buffer else self._simulated_seconds + slowest
            self.report.simulated_seconds = self._simulated_seconds

    def _train(
        self, round: int, messages: list[Message], grid: Grid, timeout: float
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self._pass_time(round, grid)
        if self.secure_threshold:
            if not messages:
                return self.aggregate_parts(round, [])
            with self.phases("train"):
                part = secure_sum(
                    grid,
                    messages,
                    self._tasks,
                    {node: client for client, node in self._directory.nodes.items()},
                    threshold_share=self.secure_threshold,
                    release_counts=self.release_counts,
                    timeout=timeout,
                )
            with self.phases("aggregate"):
                return self.aggregate_parts(round, [part])
        if self.buffer and isinstance(grid, SimulationGrid):
            with self.phases("train"):
                valid, _ = self._judged(grid.stream(messages, timeout=timeout))
            with self.phases("aggregate"):
                return self._aggregate_arrivals(self.buffer, valid)
        if not isinstance(grid, SimulationGrid):
            with self.phases("train"):
                replies = iter(grid.send_and_receive(messages, timeout=timeout))
        elif sums.only_mean(self.inner):
            parts = grid.add_up(messages, release_counts=self.release_counts, timeout=timeout)
            with self.phases("aggregate"):
                return self.aggregate_parts(round, self.phases.waiting_for("train", parts))
        else:
            replies = grid.stream(messages, timeout=timeout)
        with self.phases("aggregate"):
            return self.aggregate_train(round, self.phases.waiting_for("train", replies))

    def _task(self, client: int, server_round: int) -> Task:
        plan = self.plans[client]
        task = Task(
            round=server_round,
            noise_multiplier=plan.event.noise_multiplier,
            sample_rate=plan.sample_rate,
            local_steps=plan.local_steps or plan.event.steps,
            attempt=self._attempts.get(client, 0),
        )
        if plan.event.unit == "example":
            return task
        return dataclasses.replace(task, unit=plan.event.unit, client_rate=plan.event.sample_rate)

    @property
    def _clip_norm(self) -> float | None:
        return self.release.mechanism.clip_norm if self.release else None

    def _add_records(self, messages: Mapping[int, Message]) -> None:
        """Give messages their tasks. Those that shared a content and have equal tasks share one again."""
        ascent, within = self._ascent_record(), self._within(self.report.round)
        contents: dict[tuple[int, Task], tuple[RecordDict, RecordDict]] = {}
        for client, message in messages.items():
            given, task = message.content, self._tasks[client]
            if (id(given), task) not in contents:
                content = RecordDict({**given, records.TASK: records.task_record(task)})
                if ascent is not None:
                    content[records.ASCENT] = ascent
                if within is not None:
                    content[records.SUBSPACE] = records.subspace_record(within)
                contents[id(given), task] = given, content
            message.content = contents[id(given), task][1]

    def _ascent_record(self) -> ArrayRecord | None:
        if not self.send_ascent or self._last_arrays is None or self._last_arrays.keys() != self._arrays.keys():
            return None
        before, now = records.to_params(self._last_arrays), records.to_params(self._arrays)
        return records.to_arrays(subtract(before, now))

    def _judged(self, replies: Iterable[Message]) -> tuple[dict[int, Message], Verdicts]:
        """The valid ones by client, and what became of everybody's, which is noted."""
        verdicts: dict[int, Mapping[str, float] | Failure] = {}
        valid: dict[int, Message] = {}
        for reply in replies:
            client = self._expected(reply, verdicts)
            if client is not None:
                verdicts[client] = verdict = judge(
                    reply,
                    client=client,
                    task=self._tasks[client],
                    like=self._arrays,
                    release_counts=self.release_counts,
                    clip_norm=self._clip_norm,
                    within=self._within(self.report.round),
                )
                if not isinstance(verdict, Failure):
                    valid[client] = reply
        self._note(verdicts)
        return valid, verdicts

    def _expected(self, reply: Message, verdicts: Mapping[int, object]) -> int | None:
        """The client whose first reply this is; None, and a note, for any other reply."""
        node = self._directory.sender(reply, self._sent.values())
        client = self._directory.client_at(node)
        if client is None:
            self.report.unexpected.append(f"node {node} is no known client")
        elif client not in self._tasks:
            self.report.unexpected.append(f"client {client} was not asked")
        elif client in verdicts:
            self.report.unexpected.append(f"client {client} replied again")
        else:
            return client
        return None

    def _note(self, verdicts: Verdicts) -> None:
        self.report.note(verdicts, release_counts=self.release_counts)
        self.report.settle(self.ledger, self._charged)
        self._failed_rounds = self.report.failed_rounds(self._failed_rounds, len(self.plans))

    def _keep_model(self) -> tuple[None, None]:
        self.report.kept_model = True
        log.warning("round %d: no valid reply, the model stays as it is", self.report.round)
        return None, None

    def _aggregate_arrivals(
        self, buffer: Buffer, valid: Mapping[int, Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What was computed is kept until it arrives; what arrives moves the model of now."""
        model = records.to_params(self._arrays)
        for client, reply in valid.items():
            buffer.put(client, buffered.cargo_of(reply.content, model))
        arrived = buffer.arrive()
        self.report.arrived = {client: self.report.round - flight.round for client, flight in arrived.items()}
        replies, metrics = {}, {}
        for client, flight in arrived.items():
            if flight.cargo is not None:
                content = buffered.moved(flight.cargo, model, buffer.share(self.report.arrived[client]))
                replies[client] = Message(content, reply_to=self._question(client))
                metrics[client] = flight.cargo.metrics
        if not replies:
            return self._keep_model()
        return self._handover().all(list(arrived), replies, metrics)

    def _question(self, client: int) -> Message:
        return Message(RecordDict(), self._directory.nodes[client], MessageType.TRAIN)

    def _handover(self) -> Handover:
        return Handover(
            inner=self.inner,
            round=self.report.round,
            model=self._arrays,
            question=self._question(next(iter(self._directory.nodes))),
            release_counts=self.release_counts,
            release=self.release,
            attempt=max((task.attempt for task in self._charged.values()), default=0),
        )
