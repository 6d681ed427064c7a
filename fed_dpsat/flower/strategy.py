"""``PrivateStrategy``: any Flower strategy, with the accounting it cannot forget.

It wraps rather than subclasses. Per round it draws the cohort, charges every client in it, shows the inner
strategy a grid that holds just that cohort, and hands it only the replies that are valid, in the order of
their clients; or one reply that is their mean, if that is all it uses (``sums``). What it does with them is its own
business; how a cohort is asked is that of the kind of rounds (``round_kind``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fed_dpsat.accounting import epsilon
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import ClientPlan
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.errors import SettingError
from fed_dpsat.flower import stock, sums
from fed_dpsat.flower.buffered import Buffer
from fed_dpsat.flower.client_release import ClientRelease
from fed_dpsat.flower.exchange import Exchange
from fed_dpsat.flower.handover import Handover
from fed_dpsat.flower.nodes import CohortGrid, Directory, FederationError
from fed_dpsat.flower.report import RoundReport, by_attempt
from fed_dpsat.flower.roster import Roster
from fed_dpsat.flower.round_kind import RoundKind, seconds_of
from fed_dpsat.flower.secure_server import SecureSums
from fed_dpsat.flower.strategy_state import Plain, capture_state, restore_state
from fed_dpsat.flower.wire import codec, records
from fed_dpsat.run.timing import Phases
from fed_dpsat.step.subspace import Coordinates, Span

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
    where there are none, and the inner strategy sees what comes of it. How rounds go is left to their ``kind``: with a
    ``secure_threshold`` or a ``buffer`` one of these, else ordinary ones. ``secret_coins`` draw whom no seed tells.

    Raises ``SettingError`` for an ``inner`` that cannot be in it, ``FederationOver`` when fewer than ``min_clients``
    are left, ``FederationError`` when all asked fail or no reply is valid.
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
        release_counts: bool = False,
        join_timeout: float = 60.0,
        secure_threshold: float = 0.0,
        release: ClientRelease | None = None,
        buffer: Buffer | None = None,
        phases: Phases | None = None,
        within: Within = lambda round: None,
        fingerprint: str = "",
        secret_coins: bool = False,
    ) -> None:
        stock.check(inner)
        self.inner = inner
        self.ledger = ledger
        self.plans = plans
        self.delta = delta
        self.accountant = accountant
        self.release_counts = release_counts
        self.release = release
        self.kind = _kind(secure_threshold, buffer)
        hides = "privacy_unit=client releases nothing else" if release else self.kind.hides
        if hides and not sums.only_mean(inner):
            raise SettingError("strategy", type(inner).__name__, "one that uses only the mean of replies", hides)
        self.phases = phases or Phases()
        self._within, self._fingerprint = within, fingerprint
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
            secret_coins=secret_coins,
        )
        self._attempts: dict[int, int] = {}
        self._directory = Directory(len(plans), join_timeout, fingerprint)
        stock.take_over(inner)

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
        self.kind.check(grid)
        self.meet(grid)
        config, result = train_config or ConfigRecord(), Result()
        result.arrays = initial_arrays
        if evaluate_fn and done is None:
            evaluate_fn(0, initial_arrays)
        for round in range((done or 0) + 1, num_rounds + 1):
            if before_round:
                result.arrays = before_round(round, result.arrays)
            with self.phases("send"):
                self.configure_train(round, result.arrays, config, grid)
            self._pass_time(round, grid)
            arrays, metrics = self.kind.train(self._exchange, grid, timeout)
            result.arrays = arrays or result.arrays
            if metrics is not None:
                result.train_metrics_clientapp[round] = metrics
            if evaluate_fn and (measured := evaluate_fn(round, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[round] = measured
        return result

    def renew(self, inner: Strategy) -> None:
        """Go on with another inner strategy, or the same one from its beginning."""
        self.inner = inner
        stock.take_over(inner)

    def meet(self, grid: Grid) -> None:
        """Learn which node holds which partition; a simulation knows."""
        self._directory.meet(grid)
        self.roster.join(self._directory.nodes)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort, let the inner strategy address it, charge it, and add the assignment to each message."""
        self.report = RoundReport(round=server_round, failed_rounds=self.report.failed_rounds)
        self._directory.look_again(grid, self.roster.min_clients)
        self.roster.join(self._directory.nodes)
        cohort, retiring = self.kind.cohort(self.roster, server_round, seconds_of(grid))
        self.report.retired = {c: epsilon(spent, self.delta, self.accountant) for c, spent in retiring.items()}
        messages = self._addressed(cohort, server_round, arrays, config, grid)
        self.report.asked = list(messages)
        self.report.tossed = self.roster.tossed if len(messages) == len(cohort) else None
        assignments = self._charge(list(messages), server_round)
        within = self._within(server_round)
        self._add_records(messages, assignments, within)
        self.report.bytes_down = sum(codec.num_bytes(message.content) for message in messages.values())
        self._exchange = Exchange(
            messages=messages,
            assignments=assignments,
            handover=Handover(
                inner=self.inner,
                round=server_round,
                model=arrays,
                question=self._directory.question(next(iter(self._directory.nodes))),
                release_counts=self.release_counts,
                release=self.release,
                attempt=max((assignment.attempt for assignment in assignments.values()), default=0),
            ),
            report=self.report,
            ledger=self.ledger,
            directory=self._directory,
            phases=self.phases,
        )
        return list(messages.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Drop what is not valid, by name; the rest goes to the inner strategy in the order of clients."""
        return self._exchange.one_by_one(replies)

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
            "failed_rounds": self.report.failed_rounds,
            "inner": capture_state(self.inner),
            **self.kind.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Plain], *, next_round: int, same_noise: bool) -> None:
        """Go on with ``next_round``. What was charged of it is done again.

        With the ``same_noise`` (seeded), that is the same release, and no second charge. Else it is another attempt,
        with a charge of its own.
        """
        self.roster.begin_again(next_round, state["retired"], same_noise=same_noise)
        self.report.failed_rounds = state["failed_rounds"]
        self._attempts = {} if same_noise else {c: last + 1 for c, last in self.ledger.attempts(next_round).items()}
        restore_state(self.inner, state["inner"])
        self.kind.load_state_dict(state)

    def _addressed(
        self, cohort: list[int], round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> dict[int, Message]:
        """What the inner strategy has to say to whom, in the order of the ``cohort``.

        In a round with nobody in it that releases all the same, it is asked too: it learns the model.
        """
        shown = cohort or (list(self._directory.nodes)[:1] if self.release else [])
        view = CohortGrid(grid, [self._directory.nodes[client] for client in shown])
        messages = list(self.inner.configure_train(round, arrays, config, view)) if shown else []
        if not cohort:
            return {}
        by_client = {self._directory.client_at(message.metadata.dst_node_id): message for message in messages}
        if len(by_client) < len(messages) or not by_client.keys() <= set(cohort):
            raise FederationError(
                f"{type(self.inner).__name__} addressed nodes {[m.metadata.dst_node_id for m in messages]} in round "
                f"{round}, where the cohort is {cohort}; a strategy asks each node of the grid it is shown "
                "at most once"
            )
        return {client: by_client[client] for client in cohort if client in by_client}

    def _charge(self, asked: list[int], round: int) -> dict[int, Assignment]:
        """The assignments of all whom the round costs, once that is in the ledger: with coins, of all who have one."""
        everyone = self.release is not None and self.release.every_client
        costs = self.roster.population(round) if everyone else asked
        assignments = {
            client: Assignment.of(self.plans[client], round=round, attempt=self._attempts.get(client, 0))
            for client in costs
        }
        for attempt, events in by_attempt(assignments):
            self.ledger.charge_many(round, attempt, events)
        self.roster.charged(costs)
        self._attempts = {}
        return assignments

    def _pass_time(self, round: int, grid: Grid) -> None:
        if seconds := seconds_of(grid):
            self.kind.pass_time(seconds(client, round) for client in self.report.asked)
            self.report.simulated_seconds = self.kind.now

    def _add_records(
        self, messages: Mapping[int, Message], assignments: Mapping[int, Assignment], within: Coordinates | Span | None
    ) -> None:
        """Give messages their assignments. Those that shared a content and have equal assignments share one again."""
        contents: dict[tuple[int, Assignment], tuple[RecordDict, RecordDict]] = {}
        for client, message in messages.items():
            given, assignment = message.content, assignments[client]
            if (id(given), assignment) not in contents:
                content = RecordDict(
                    {
                        **given,
                        records.ASSIGNMENT: records.assignment_record(assignment),
                        **records.same_content(self._fingerprint),
                    }
                )
                if within is not None:
                    content[records.SUBSPACE] = records.subspace_record(within)
                contents[id(given), assignment] = given, content
            message.content = contents[id(given), assignment][1]


def _kind(secure_threshold: float, buffer: Buffer | None) -> RoundKind:
    """As the arguments say; ordinary without any."""
    if secure_threshold and buffer:
        raise SettingError("buffer", buffer.size, "None with a secure_threshold", "masks cancel within one cohort")
    return buffer or (SecureSums(secure_threshold) if secure_threshold else RoundKind())
