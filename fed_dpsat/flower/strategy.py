"""``PrivateStrategy``: any Flower strategy, with accounting.

It wraps another strategy. In each round it draws the cohort, charges every client in it, shows the inner strategy a
grid with only that cohort, and gives it only valid replies, in the order of their clients; or one reply with their
mean, if the inner strategy uses only that (``sums``). The kind of rounds (``RoundKind``) asks the cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fed_dpsat.errors import SettingError
from fed_dpsat.flower import sums
from fed_dpsat.flower.inner import (
    Plain,
    StrategyStateError,
    capture_state,
    check_inner,
    restore_state,
    take_over,
)
from fed_dpsat.flower.nodes import NOTHING, Directory
from fed_dpsat.flower.roster import Roster
from fed_dpsat.flower.round import NO_RECORDS, Round, RoundKind, RoundReport, seconds_of
from fed_dpsat.flower.sums import ClientRelease, Part
from fed_dpsat.params import Params
from fed_dpsat.run.timing import Phases
from fed_dpsat.step.subspace import Coordinates, Span

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
BeforeRound = Callable[[int, ArrayRecord], ArrayRecord]
"""A function from a round and the model before it to the model that it starts from: layers may join."""

Within = Callable[[int], Coordinates | Span | None]
"""A function from a round, from 1, to the subspace that its replies are in; None for whole models."""


class PrivateStrategy(Strategy):
    """``inner`` with cohorts, charges and checks.

    The ``roster`` holds the plans, the ledger and the rule that draws cohorts: all public, never a function of data.
    A charge is durable before a message is sent, and stays whatever becomes of the reply. With a ``release`` the unit
    is one client: the replies are bounded, added up and noised here, also if there are none, and the inner strategy
    sees only the result. ``kind`` is the kind of rounds; None stands for ordinary ones. ``sends`` are the records that
    the client's half of ``inner`` adds to a reply: a reply with others, or of other shapes or types, is invalid.

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
        same: Mapping[str, str] = NOTHING,
        sends: Mapping[str, Params] = NO_RECORDS,
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
        if sends and sums.only_mean(inner):
            name, remedy = type(inner).__name__, "leave only_mean unset: a mean holds models alone"
            raise SettingError("strategy", name, f"one that receives {', '.join(sends)} of single replies", remedy)
        self.phases = phases or Phases()
        self._within, self._same, self._sends = within, same, sends
        self.report = RoundReport(round=0)
        self._attempts: dict[int, int] = {}
        self._directory = Directory(len(self.plans), join_timeout, same)
        take_over(inner)

    @property
    def retired(self) -> dict[int, int]:
        """Clients that could not afford another round, with the round in which they were left out."""
        return self.roster.retired

    @property
    def connected(self) -> Collection[int]:
        """The clients that were connected at the last round."""
        return self._directory.nodes.keys()

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
        """Find the node of each partition; then run Flower's loop, after the ``done`` rounds.

        ``evaluate_fn`` is called after each round and, if no round is done, before the first. No client evaluates.
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
        """Continue with another inner strategy, or with a new one of the same class."""
        self.inner = inner
        take_over(inner)

    def meet(self, grid: Grid) -> None:
        """Find the node of each partition."""
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
        self._round.assign(self._within(server_round), self._same, self._sends)
        return list(self._round.messages.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message | Part]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The last phase of a round: drop invalid replies, by name, and give the others to the inner strategy.

        ``replies`` come from clients, or are sums of replies that workers have judged; they may arrive during the call.
        """
        with self.phases("aggregate"):
            return self.kind.aggregate(self._round, self.phases.waiting_for("train", replies))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask no client: metrics on private data do not leave a client."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing: no client was asked."""
        return None

    def summary(self) -> None:
        """Log the settings of the inner strategy."""
        self.inner.summary()

    def state_dict(self) -> dict[str, Plain]:
        """The state after this round, for a checkpoint; raises ``StrategyStateError``."""
        if self.release and (reason := self.release.cannot_resume):
            raise StrategyStateError(reason)
        return {
            "retired": dict(self.retired),
            "failed_rounds": self.report.failed_rounds,
            "inner": capture_state(self.inner),
            **(self.release.state_dict() if self.release else {}),
            **self.kind.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Plain], *, next_round: int, same_noise: bool) -> None:
        """Continue with ``next_round``, and repeat the part of it that was charged.

        With the ``same_noise`` (seeded), the repetition is the same release, without a second charge. Otherwise it is
        another attempt, with its own charge.
        """
        if self.release:
            self.release.check_state_dict(state)
        self.roster.begin_again(next_round, state["retired"], same_noise=same_noise)
        self.report.failed_rounds = state["failed_rounds"]
        self._attempts = {} if same_noise else {c: last + 1 for c, last in self.ledger.attempts(next_round).items()}
        restore_state(self.inner, state["inner"])
        self.kind.load_state_dict(state)

    def _pass_time(self, round: int, grid: Grid) -> None:
        if seconds := seconds_of(grid):
            self.kind.pass_time(seconds(client, round) for client in self.report.asked)
            self.report.simulated_seconds = self.kind.now
