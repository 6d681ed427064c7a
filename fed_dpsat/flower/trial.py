"""The trial of a whole federation (see ``client.trial``): clients, codec, strategy, evaluation, with nothing on disk.

A strategy that uses only the mean has two clients in the trial; secure aggregation has three, which hide each other;
any other strategy has a whole cohort. A given ``client_app`` and the transport of Ray are not in the trial.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import make_plans, plan_of
from fed_dpsat.client import trial
from fed_dpsat.client.blame import Unfit, optimizer_remedy, told
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import measured, metrics_of, quality_of
from fed_dpsat.client.given import copied
from fed_dpsat.errors import SettingError
from fed_dpsat.flower import sums
from fed_dpsat.flower.client_app import StackingClientApp, make_client_app
from fed_dpsat.flower.federation import build_strategy, private_strategy, unfrozen
from fed_dpsat.flower.grid import FIRST_NODE_ID, Answers, SimulationGrid, node_context
from fed_dpsat.flower.recorder import measure_personal
from fed_dpsat.flower.strategy import PrivateStrategy
from fed_dpsat.flower.wire import compat, records


def try_federation(experiment: Experiment, strategy: Strategy | None = None, objects: Sequence[str] = ()) -> None:
    """The first rounds of ``experiment`` under ``strategy``, or the one that it names, on made-up examples.

    ``objects`` names the objects that were given in Python. Raises ``TrialError`` for a failure, and the errors of
    ``build_strategy`` and ``make_plans``. The trial does not change the given objects.
    """
    config = experiment.config
    noise_multiplier = min(plan.event.noise_multiplier for plan in make_plans(config))
    inner = strategy or build_strategy(config)
    if not len(experiment.dataset.test):
        raise SettingError(
            "dataset",
            experiment.dataset.name,
            "with at least one test example",
            "set validation_share=0.1, which puts training examples aside for it",
        )
    if "client_app" in objects:
        return
    with (
        trial.untouched(experiment.device),
        trial.held_back_logs(),
        compat.as_before(),
        told(experiment, objects, inner),
    ):
        memo: dict[int, object] = {}
        clients = _clients(experiment, inner)
        tried = trial.rehearsal(experiment, clients, noise_multiplier=noise_multiplier, memo=memo)
        trial.check_outputs(tried)
        _rounds(tried, copied("strategy", inner, memo) if strategy else inner)


def _clients(experiment: Experiment, inner: Strategy) -> int:
    cohort, secure = experiment.config.cohort_size, experiment.config.secure_aggregation
    return min(cohort, 3 if secure else 2) if sums.only_mean(inner) else cohort


def _rounds(tried: Experiment, inner: Strategy) -> None:
    """Flower's loop over the clients of ``tried``, with a ledger in memory."""
    config, no_model = tried.config, list[bool]()
    grid = SimulationGrid(_Clients(tried), config.num_clients, seconds=lambda client, round: 1.0 + client)
    with PrivacyLedger(":memory:") as ledger:
        private = private_strategy(tried, inner, ledger, [plan_of(config)] * config.num_clients)
        private.start(
            grid,
            records.to_arrays(tried.shared(1)),
            min(config.num_rounds, 2),
            evaluate_fn=lambda round, arrays: _after_round(tried, private, grid, arrays, no_model),
            before_round=lambda round, arrays: unfrozen(tried, private, round, arrays),
        )
    if all(no_model[1:]):  # the first is from before the rounds
        remedy = "return the new model from aggregate_train, or the model as it is in a round that changes nothing"
        raise Unfit("strategy", f"{type(inner).__name__}.aggregate_train returns no model in any round", remedy)
    if config.privacy_unit != "client":
        tried.carried_state()
    trial.check_carried(tried)


def _after_round(
    tried: Experiment, private: PrivateStrategy, grid: SimulationGrid, arrays: ArrayRecord, no_model: list[bool]
) -> MetricRecord | None:
    """The work of a run after a round; raises ``Unfit`` for a reply that did not count.

    Adds to ``no_model`` whether the strategy returned none.
    """
    no_model.append(private.report.no_model)
    if dropped := private.report.dropped:
        reason = min(dropped.values())
        raise Unfit("optimizer", f"a client's reply after its first steps: {reason}", optimizer_remedy(reason))
    _, predictions = measured(tried.loss_fn.module, records.to_params(arrays), tried.dataset.test, tried.task)
    if predictions is not None:
        quality_of(predictions, tried.dataset.num_classes)
        metrics_of(predictions, tried.task)
    if tried.has_own_models:
        measure_personal(grid, arrays, tried)
    return None


class _Clients:
    """A backend whose clients run in this process, and raise their errors."""

    def __init__(self, tried: Experiment) -> None:
        config = tried.config
        self._app = make_client_app(lambda _: tried)
        self._clip_norm = config.clip_norm if config.privacy_unit == "client" else None
        self._stack = config.stack_clients
        settings, count = config.settings(), config.num_clients
        nodes = range(FIRST_NODE_ID, FIRST_NODE_ID + count)
        self._contexts = {node: node_context(node, settings, count) for node in nodes}

    def run(
        self, messages: Sequence[Message], *, release_counts: bool | None, timeout: float | None
    ) -> Iterator[Answers]:
        """See ``Backend.run``."""
        for start in range(0, len(messages), self._stack):
            asked = messages[start : start + self._stack]
            replies = self._replies(asked, [self._contexts[message.metadata.dst_node_id] for message in asked])
            if release_counts is None:
                yield Answers(replies=replies)
                continue
            tree = sums.Tree(start)
            for message, reply in zip(asked, replies, strict=True):
                client = message.metadata.dst_node_id - FIRST_NODE_ID
                tree.add(
                    sums.judged_part(message, reply, client, release_counts=release_counts, clip_norm=self._clip_norm)
                )
            yield Answers(parts=tree.nodes)

    def _replies(self, asked: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        app, replies = self._app, None
        if len(asked) > 1 and isinstance(app, StackingClientApp):
            try:
                replies = app.train_together(asked, contexts)
            except Exception:  # after a failure together, clients train alone, as in a run
                replies = None
        if replies is None:
            replies = [app(message, context) for message, context in zip(asked, contexts, strict=True)]
        return replies

    def close(self) -> None:
        """Nothing to release."""
