"""One round of a run: draw, charge, ask, judge, add up, hand over.

``Round`` has these phases in this order. The kinds of rounds differ in a few of them, which are the methods of
``RoundKind``: drawing a cohort, asking it, and aggregating the replies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, MetricRecordValues, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fed_dpsat.accounting import epsilon
from fed_dpsat.accounting.event import History, PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.blame import blamed_on
from fed_dpsat.flower import sums
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.judge import BYTES, Failure, Verdict, Verdicts, judge
from fed_dpsat.flower.nodes import CohortGrid, Directory, FederationError
from fed_dpsat.flower.roster import Roster
from fed_dpsat.flower.wire import codec, compat, records
from fed_dpsat.flower.wire.records import RecordError
from fed_dpsat.params import Params
from fed_dpsat.step.subspace import Coordinates, Span
from fed_dpsat.step.threads import intra_op_threads

log = getLogger("fed_dpsat")

MAX_FAILED_ROUNDS = 3
"""Rounds in a row without a valid reply, and with a client that failed or sent another, after which a run ends."""

DIVERGED = "; if that is a model that diverged, start a new run with a lower lr"

Aggregate = tuple[ArrayRecord | None, MetricRecord | None]

NO_RECORDS: Mapping[str, Params] = {}

Seconds = Callable[[int, int], float]
"""A function from client and round to the simulated time until the reply."""


class RoundKind:
    """Ordinary rounds; another kind overrides some of the methods.

    It receives a grid to ask over only with a round that is charged. ``now`` is simulated time, in seconds.
    """

    hides = ""
    """The reason why the inner strategy cannot see single replies; empty if it can."""

    now = 0.0

    def check(self, grid: Grid) -> None:
        """Raise ``FederationError`` if ``grid`` cannot have such rounds."""

    def cohort(self, roster: Roster, round: int, seconds: Seconds | None) -> tuple[list[int], dict[int, History]]:
        """The clients that ``round`` asks, ascending; and the retiring ones, as in ``Roster.eligible``."""
        return roster.cohort(round)

    def pass_time(self, lasting: Iterable[float]) -> None:
        """Advance the time by that of the slowest client."""
        self.now += max(lasting, default=0.0)

    def ask(self, round: Round, grid: Grid, timeout: float) -> Iterable[Message | sums.Part]:
        """Replies to the messages of the round; or sums from workers, if the inner strategy uses only the mean."""
        messages = list(round.messages.values())
        if not isinstance(grid, SimulationGrid):
            return grid.send_and_receive(messages, timeout=timeout)
        if sums.only_mean(round.inner):
            return grid.add_up(messages, release_counts=round.release_counts, timeout=timeout)
        return grid.stream(messages, timeout=timeout)

    def aggregate(self, round: Round, replies: Iterable[Message | sums.Part]) -> Aggregate:
        """The next model and the metrics of the round."""
        return round.aggregate(replies)

    def state_dict(self) -> dict[str, Any]:
        """The state after this round, as entries of the strategy's ``state_dict``."""
        return {"simulated_seconds": self.now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the entries of ``state_dict`` from the strategy's ``state``."""
        self.now = state["simulated_seconds"]


def seconds_of(grid: Grid) -> Seconds | None:
    """The simulated times of clients; None without simulated time."""
    return grid.seconds if isinstance(grid, SimulationGrid) else None


@dataclass(kw_only=True)
class RoundReport:
    """The outcome of a round for each client that was asked, and the clients that retired with their epsilon.

    ``tossed`` is the number of clients with a coin, if the inner strategy asked all clients that coins drew.
    ``no_model``: the inner strategy was given replies, and returned no model.
    ``arrived`` belongs to asynchronous rounds: the age in rounds of each update that moved the model.
    ``failed_rounds`` counts the rounds in a row, up to this one, in which clients failed or sent invalid replies and no
    reply was valid. A round without a client that was asked and present neither counts nor breaks the row.
    """

    round: int
    failed_rounds: int = 0
    asked: list[int] = field(default_factory=list)
    tossed: int | None = None
    accepted: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    retired: dict[int, float] = field(default_factory=dict)
    released: dict[int, dict[str, Any]] = field(default_factory=dict)
    at_fault: dict[int, Failure] = field(default_factory=dict)
    arrived: dict[int, int] | None = None
    simulated_seconds: float | None = None
    no_model: bool = False
    bytes_down: int = 0
    bytes_up: int = 0
    kept_model: bool = False

    def note(self, verdicts: Verdicts, *, release_counts: bool) -> None:
        """Sort the clients that were asked by their verdicts; a client without a verdict was absent."""
        for client in self.asked:
            verdict = verdicts.get(client, Failure(reason="no reply", kind="absent"))
            if not isinstance(verdict, Failure):
                self.accepted.append(client)
                self.bytes_up += int(verdict[BYTES])
                if release_counts:
                    self.released[client] = {records.NONFINITE: verdict[records.NONFINITE]}
                continue
            self.dropped[client] = verdict.reason
            if verdict.kind != "absent":
                self.at_fault[client] = verdict
            log.warning("round %d: client %d dropped: %s", self.round, client, verdict.reason)

    def count_failure(self, num_clients: int) -> None:
        """Raise ``FederationError`` after enough ``failed_rounds``, or if all clients of the run failed."""
        if self.accepted or not self.at_fault:
            self.failed_rounds = 0 if self.accepted else self.failed_rounds
            return
        self.failed_rounds += 1
        failed = [client for client, failure in self.at_fault.items() if failure.kind == "failed"]
        if len(failed) == num_clients or self.failed_rounds == MAX_FAILED_ROUNDS:
            client, first = next(iter(self.at_fault.items()))
            what = "no reply was valid" if len(failed) < len(self.asked) else "every client that was asked failed"
            raise FederationError(
                f"{what}, {self.failed_rounds} round(s) in a row until round {self.round}; client {client}: "
                f"{first.reason}{DIVERGED if first.kind == 'invalid' else ''}"
            )


@dataclass(kw_only=True)
class Round:
    """Round ``number`` of ``inner``, whose clients start from ``model``; each phase adds to the ``report``.

    ``messages`` are by client. ``assignments`` has each client that the round costs, and is in the ledger. With a
    ``release`` the inner strategy sees only the released sum of replies.
    """

    number: int
    model: ArrayRecord
    inner: Strategy
    roster: Roster
    directory: Directory
    report: RoundReport
    release: sums.ClientRelease | None
    release_counts: bool
    messages: dict[int, Message] = field(default_factory=dict)
    assignments: dict[int, Assignment] = field(default_factory=dict)

    def draw(self, kind: RoundKind, config: ConfigRecord, grid: Grid) -> None:
        """Draw the cohort, and take the messages of the inner strategy to it.

        Raises ``FederationOver`` if too few clients have budget left, ``FederationError`` if too few are connected.
        """
        self.directory.look_again(grid, self.roster.min_clients)
        self.roster.join(self.directory.nodes)
        cohort, retiring = kind.cohort(self.roster, self.number, seconds_of(grid))
        delta, accountant = self.roster.delta, self.roster.accountant
        self.report.retired = {c: epsilon(spent, delta, accountant) for c, spent in retiring.items()}
        self.messages = self._addressed(cohort, config, grid)
        self.report.asked = list(self.messages)
        self.report.tossed = self.roster.tossed if len(self.messages) == len(cohort) else None

    def charge(self, attempts: Mapping[int, int]) -> None:
        """Make the assignments of all clients that the round costs, and charge them: with coins, each client with one.

        ``attempts`` are by client, of a round that is repeated.
        """
        everyone = self.release is not None and self.release.every_client
        costs = self.roster.population(self.number) if everyone else list(self.messages)
        made: dict[tuple[int, int], Assignment] = {}  # clients of one plan and attempt share an object
        for client in costs:
            plan, attempt = self.roster.plans[client], attempts.get(client, 0)
            if (id(plan), attempt) not in made:
                made[id(plan), attempt] = Assignment.of(plan, round=self.number, attempt=attempt)
            self.assignments[client] = made[id(plan), attempt]
        self.roster.check_promise(costs, self.number)
        for attempt, events in self._charges():
            self.roster.ledger.charge_many(self.number, attempt, events)
        self.roster.charged(costs, self.number)

    def assign(
        self, within: Coordinates | Span | None, same: Mapping[str, str], sends: Mapping[str, Params] = NO_RECORDS
    ) -> None:
        """Add its assignment to each message, and the forms of what a client's half ``sends``.

        Messages with a common content and a common assignment keep one content.
        """
        contents: dict[tuple[int, int], tuple[RecordDict, RecordDict]] = {}
        for client, message in self.messages.items():
            given, assignment = message.content, self.assignments[client]
            if (id(given), id(assignment)) not in contents:
                content = RecordDict({**given, records.ASSIGNMENT: records.assignment_record(assignment)})
                content.update(records.same_content(same))
                content.update(records.sends_content(sends))
                if within is not None:
                    content[records.SUBSPACE] = records.subspace_record(within)
                contents[id(given), id(assignment)] = given, content
            message.content = contents[id(given), id(assignment)][1]
        sizes = {id(content): codec.num_bytes(content) for _, content in contents.values()}
        self.report.bytes_down = sum(sizes[id(message.content)] for message in self.messages.values())

    def aggregate(self, replies: Iterable[Message | sums.Part]) -> Aggregate:
        """Judge single replies, and hand over the valid ones; sums from workers are judged already."""
        tree, valid, verdicts = sums.Tree(), dict[int, Message](), dict[int, Verdict]()
        for reply in replies:
            if isinstance(reply, sums.Part):
                with intra_op_threads(1):  # waiting threads cost more than they save
                    tree.add(reply)
            else:
                self._judge(reply, valid, verdicts)
        if not tree.nodes:
            self._note(verdicts)
            return self.hand_over(self.report.asked, valid, verdicts)
        with intra_op_threads(1):
            total = tree.total()
        self._note({**total.accepted, **total.failed})
        return self._hand_over_mean(total)

    def judged(self, replies: Iterable[Message]) -> tuple[dict[int, Message], Verdicts]:
        """The valid replies by client, and all verdicts, which are noted in the report and the ledger."""
        valid, verdicts = dict[int, Message](), dict[int, Verdict]()
        for reply in replies:
            self._judge(reply, valid, verdicts)
        self._note(verdicts)
        return valid, verdicts

    def hand_over(self, order: Sequence[int], valid: Mapping[int, Message], verdicts: Verdicts) -> Aggregate:
        """Give the inner strategy the ``valid`` replies in the order of clients; or their mean, if it uses only that.

        ``order`` has all clients that could have replied, and fixes the tree of the sum. Without a valid reply the
        model does not change, except by the noise of a release.
        """
        if sums.only_mean(self.inner):
            clip_norm = self.clip_norm
            parts = (
                sums.part_of(c, valid.get(c), verdicts.get(c), before=self._sent(c), clip_norm=clip_norm) for c in order
            )
            return self._hand_over_mean(sums.merge(parts))
        return self._aggregated([valid[client] for client in sorted(valid)]) if valid else self._keep_model()

    @property
    def clip_norm(self) -> float | None:
        """The bound of one client's change, if there is one."""
        return self.release.mechanism.clip_norm if self.release else None

    def _addressed(self, cohort: list[int], config: ConfigRecord, grid: Grid) -> dict[int, Message]:
        """The messages of the inner strategy by client, in the order of the ``cohort``.

        An empty round with a release asks it too, because it has to learn the model.
        """
        nodes = self.directory.nodes
        shown = cohort or (list(nodes)[:1] if self.release else [])
        view = CohortGrid(grid, [nodes[client] for client in shown])
        messages = list(self.inner.configure_train(self.number, self.model, config, view)) if shown else []
        if not cohort:
            return {}
        by_client = {self.directory.client_at(message.metadata.dst_node_id): message for message in messages}
        if len(by_client) < len(messages) or not by_client.keys() <= set(cohort):
            raise FederationError(
                f"{type(self.inner).__name__} addressed nodes {[m.metadata.dst_node_id for m in messages]} in round "
                f"{self.number}, where the cohort is {cohort}; a strategy asks each node of the grid it is shown "
                "at most once"
            )
        return {client: by_client[client] for client in cohort if client in by_client}

    def _judge(self, reply: Message, valid: dict[int, Message], verdicts: dict[int, Verdict]) -> None:
        """The verdict on the first reply of each client of the round; a note about any other reply."""
        node = self.directory.sender(reply, self.messages.values())
        client = self.directory.client_at(node)
        if client is None:
            self.report.unexpected.append(f"node {node} is no known client")
        elif client not in self.messages:
            self.report.unexpected.append(f"client {client} was not asked")
        elif client in verdicts:
            self.report.unexpected.append(f"client {client} replied again")
        else:
            asked, counts = self.messages[client].content, self.release_counts
            verdicts[client] = verdict = judge(reply, asked, client, release_counts=counts, clip_norm=self.clip_norm)
            if isinstance(verdict, Mapping):
                valid[client] = reply

    def _charges(self) -> Iterator[tuple[int, dict[int, PrivacyEvent]]]:
        """The events of each attempt, by client; most rounds have one attempt."""
        for attempt in sorted({assignment.attempt for assignment in self.assignments.values()}):
            yield attempt, {c: a.event for c, a in self.assignments.items() if a.attempt == attempt}

    def _note(self, verdicts: Verdicts) -> None:
        self.report.note(verdicts, release_counts=self.release_counts)
        for attempt, events in self._charges():
            settled = self.roster.ledger.outcomes(
                self.number, attempt
            )  # written by a server that was killed later in this round
            outcomes = {c: self.report.dropped.get(c, "released") for c in events if c not in settled}
            self.roster.ledger.settle_many(self.number, attempt, outcomes)
        self.report.count_failure(self.directory.num_clients)

    def _sent(self, client: int) -> ArrayRecord:
        """The model that ``client`` started from."""
        asked = self.messages.get(client)
        sent = None if asked is None else records.arrays_in(asked.content, records.ARRAYS)
        return self.model if sent is None else sent

    def _hand_over_mean(self, total: sums.Part) -> Aggregate:
        """Give the inner strategy one reply: the mean of ``total``, or its release."""
        if not total.accepted and not self.release:
            return self._keep_model()
        metrics: dict[str, MetricRecordValues] = {records.NUM_EXAMPLES: total.weight}
        if self.release:
            attempt = max((assignment.attempt for assignment in self.assignments.values()), default=0)
            arrays = self.release.model(total, self.model, round=self.number, attempt=attempt)
            metrics = {records.NUM_EXAMPLES: 1}
        else:
            arrays = records.to_arrays(total.mean() or {})
            if self.release_counts:
                counts = [m[records.NONFINITE] * m[records.NUM_EXAMPLES] for m in total.accepted.values()]
                metrics[records.NONFINITE] = sum(counts) / total.weight
        content = RecordDict({records.ARRAYS: arrays, records.METRICS: MetricRecord(metrics)})
        question = self.directory.question(next(iter(self.directory.nodes)))
        return self._aggregated([Message(content, reply_to=question)])

    @blamed_on("strategy")
    def _aggregated(self, replies: list[Message]) -> Aggregate:
        """The inner strategy's aggregate of ``replies``, in the types of the model (some strategies return float64).

        Raises ``FederationError`` unless it has the names and shapes of the model and is finite.
        """
        arrays, metrics = self.inner.aggregate_train(self.number, replies)
        if arrays is None:
            self.report.no_model = True
            return None, metrics
        name = type(self.inner).__name__
        if arrays.keys() != self.model.keys():
            raise FederationError(f"{name} returned {list(arrays)}, not {list(self.model)}")
        model = compat.record_of({k: _cast(compat.view(a), self.model[k].dtype) for k, a in arrays.items()})
        try:
            records.check_arrays(RecordDict({records.ARRAYS: model}), self.model)
        except RecordError as error:
            raise FederationError(
                f"{name} returned other parameters than the model's, or in another order: {error}"
            ) from error
        return model, metrics

    def _keep_model(self) -> Aggregate:
        self.report.kept_model = True
        log.warning("round %d: no valid reply, the model stays as it is", self.number)
        return None, None


def _cast(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """``array`` as ``dtype``; whole numbers are rounded, since a weighted mean of 17s may be 16.999."""
    whole = np.issubdtype(np.dtype(dtype), np.integer)
    return np.asarray(np.rint(array) if whole else array, dtype=dtype)
