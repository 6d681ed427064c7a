"""``PrivateStrategy``: any Flower strategy, with the accounting it cannot forget.

It wraps rather than subclasses. Per round it draws the cohort, charges every client in it, shows the inner
strategy a grid that holds just that cohort, and hands it only the replies that are valid, in the order of
their clients; or one reply that is their mean, if that is all it uses (``sums``). What it does with them is its own
business; how a cohort is asked is that of the kind of rounds (``RoundKind``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fed_dpsat.errors import SettingError
from fed_dpsat.flower import sums
from fed_dpsat.flower.inner import Plain, capture_state, check_inner, restore_state, take_over
from fed_dpsat.flower.nodes import Directory
from fed_dpsat.flower.roster import Roster
from fed_dpsat.flower.round import Round, RoundKind, RoundReport, seconds_of
from fed_dpsat.flower.sums import ClientRelease, Part
from fed_dpsat.run.timing import Phases
from fed_dpsat.step.subspace import Coordinates, Span

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
BeforeRound = Callable[[int, ArrayRecord], ArrayRecord]
"""The model that a round starts from, of the one after the last round: layers may join."""

Within = Callable[[int], Coordinates | Span | None]
"""A round, from 1, to what it can change: replies are then the numbers of that subspace; None is whole models."""


class PrivateStrategy(Strategy):
    """``inner`` with cohorts, charges and checks around it.

    The ``roster`` holds the plans, the ledger and the rule that draws cohorts: all public, never a function of data.
    A charge is durable before a message is sent, and stays whatever becomes of the reply. With a ``release`` the unit
    is one client: the replies are bounded, added up and noised here, also if there are none, and the inner strategy
    sees only the result. ``kind`` is the kind of rounds; None stands for ordinary ones.

    Raises ``SettingError`` for an ``inner`` that it cannot wrap, ``FederationOver`` if fewer than ``min_clients`` are
    left, ``FederationError`` if all clients fail or no reply is valid.
    """

    def __init__(
        self,
        inner: Strategy,
        roster: Roster,
        *,
        release_counts: bool = False,
        join_timeout: float = 60.0,
        release: ClientRelease | None = None,
        kind: RoundKind | None = None,
        phases: Phases | None = None,
        within: Within = lambda round: None,
        fingerprint: str = "",
    ) -> None:
        check_inner(inner)
        self.inner = inner
        self.roster, self.ledger, self.plans = roster, roster.ledger, roster.plans
        self.release_counts = release_counts
        self.release = release
        self.kind = kind or RoundKind()
        hides = "privacy_unit=client releases nothing else" if release else self.kind.hides
        if hides and not sums.only_mean(inner):
            raise SettingError("strategy", type(inner).__name__, "one that uses only the mean of replies", hides)
        self.phases = phases or Phases()
        self._within, self._fingerprint = within, fingerprint
        self.report = RoundReport(round=0)
        self._attempts: dict[int, int] = {}
        self._directory = Directory(len(self.plans), join_timeout, fingerprint)
        take_over(inner)

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
            with self.phases("train"):
                replies = self.kind.ask(self._round, grid, timeout)
            arrays, metrics = self.aggregate_train(round, replies)
            result.arrays = arrays or result.arrays
            if metrics is not None:
                result.train_metrics_clientapp[round] = metrics
            if evaluate_fn and (measured := evaluate_fn(round, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[round] = measured
        return result

    def renew(self, inner: Strategy) -> None:
        """Go on with another inner strategy, or the same one from its beginning."""
        self.inner = inner
        take_over(inner)

    def meet(self, grid: Grid) -> None:
        """Learn which node holds which partition; a simulation knows."""
        self._directory.meet(grid)
        self.roster.join(self._directory.nodes)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort, let the inner strategy address it, charge it, and add the assignment to each message."""
        self.report = RoundReport(round=server_round, failed_rounds=self.report.failed_rounds)
        self._round = Round(
            number=server_round,
            model=arrays,
            inner=self.inner,
            roster=self.roster,
            directory=self._directory,
            report=self.report,
            release=self.release,
            release_counts=self.release_counts,
        )
        self._round.draw(self.kind, config, grid)
        self._round.charge(self._attempts)
        self._attempts = {}
        self._round.assign(self._within(server_round), self._fingerprint)
        return list(self._round.messages.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message | Part]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The last phase of a round: drop invalid replies, by name, and hand the rest to the inner strategy.

        ``replies`` are of clients, or sums of replies that workers have judged; they may come while this waits.
        """
        with self.phases("aggregate"):
            return self.kind.aggregate(self._round, self.phases.waiting_for("train", replies))

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

    def _pass_time(self, round: int, grid: Grid) -> None:
        if seconds := seconds_of(grid):
            self.kind.pass_time(seconds(client, round) for client in self.report.asked)
            self.report.simulated_seconds = self.kind.now
