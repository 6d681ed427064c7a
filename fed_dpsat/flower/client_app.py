"""Flower's client handlers and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fed_dpsat.accounting.event import History
from fed_dpsat.accounting.plans import spend
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import measured
from fed_dpsat.client.half import received_by
from fed_dpsat.client.train import Request
from fed_dpsat.client.trial import try_client
from fed_dpsat.flower.wire import codec, compat, records
from fed_dpsat.flower.wire.records import Kept, RecordError
from fed_dpsat.params import Params
from fed_dpsat.run.process import tune_allocator
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.loop import LocalResult
from fed_dpsat.step.optimizers.base import State
from fed_dpsat.step.threads import intra_op_threads

Provider = Callable[[Mapping[str, Any]], Experiment]
"""A function from Flower's run config to the experiment of this process."""


DEVICE, SECURE_AGGREGATION = "fed_dpsat.device.handlers", "fed_dpsat.secagg.client"
"""Modules that answer instead of an ordinary client; a message or a node that needs one loads it."""


def _wing(name: str) -> Any:
    return importlib.import_module(name)


@lru_cache(maxsize=1)
def _experiment(settings: tuple[tuple[str, Any], ...]) -> Experiment:
    return Experiment.build(RunConfig.from_mapping(dict(settings)))


def from_run_config(run_config: Mapping[str, Any]) -> Experiment:
    """The experiment that the run config names, built once per process."""
    return _experiment(tuple(sorted(run_config.items())))


class _Unpack:
    """The records of the last messages as tensors, copied once for all clients of a round in this process."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[ArrayRecord, Params]] = {}

    def __call__(self, content: RecordDict, key: str) -> Params | None:
        """The record ``key``, or None without one. Callers must not change its tensors."""
        record = records.arrays_in(content, key)
        if record is None:
            return None
        held, params = self._last.get(key, (None, {}))
        if held is not record or any(t._version for t in params.values()):
            params = records.to_params(record)
            self._last[key] = record, params
        return params

    def check_untouched(self) -> None:
        """Raise ``RecordError`` if a plug-in wrote into the tensors, because the next client starts from them."""
        changed = [name for _, params in self._last.values() for name, t in params.items() if t._version]
        if changed:
            self._last.clear()
            raise RecordError(
                f"the optimizer, model or client's half changed {changed[0]} in place, which other clients begin with "
                "too; make a new tensor (torch.add instead of add_)"
            )


TrainTogether = Callable[[Sequence[Message], Sequence[Context]], list[Message] | None]


@dataclass(frozen=True, kw_only=True)
class StackReply:
    """The replies of clients to one content, as they are stacked: ``params[K, ...]``, and the ``metrics`` of each.

    ``state[K, ...]`` and ``histories`` are what they keep after the round.
    """

    params: Params
    state: State
    metrics: list[dict[str, float]]
    histories: list[History]


TrainStack = Callable[[RecordDict, Mapping[str, Any], Mapping[int, Kept | None]], StackReply | None]
"""A function of the content of a message, the run config, and what each client that receives it keeps."""


class StackingClientApp(ClientApp):
    """A client app that can also train several clients of one process at once; a simulation asks it to.

    ``train_together`` answers all its training messages, in order, and keeps all their states. Or it answers none:
    it raises, or returns None for messages that need single answers, and no context has changed. ``train_stack`` does
    the same for clients that receive one content, without a message for each.
    """

    def __init__(self, train_together: TrainTogether, train_stack: TrainStack) -> None:
        super().__init__()
        self.train_together, self.train_stack = train_together, train_stack


def make_client_app(provider: Provider) -> ClientApp:
    """A client that trains on the experiment of ``provider``, with the partition of its node's configuration."""
    unpack, tried = _Unpack(), list[Experiment]()
    client_app = StackingClientApp(
        lambda messages, contexts: _train_together(provider, messages, contexts, unpack),
        lambda content, run_config, kept: _train_stack(provider, content, run_config, kept, unpack),
    )

    @client_app.query()
    def identify(message: Message, context: Context) -> Message:
        if records.POLICY in context.node_config:
            return Message(_wing(DEVICE).identify(message, context), reply_to=message)
        if context.run_id != compat.SIMULATION_RUN_ID:  # where the code of the server is that of this process
            records.check_protocol(message.content, "this client")
        experiment, client = provider(context.run_config), _client(context)
        _check_same(experiment, message)
        if not any(one is experiment for one in tried):  # once, before the server charges for anything
            try_client(experiment)
            tried[:] = [experiment]
        return Message(records.identity_content(client, experiment.sizes[client]), reply_to=message)

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        secure = records.SECURE in message.content
        if secure and records.POLICY in context.node_config:
            raise RecordError("a device with a policy takes no part in secure aggregation yet; nothing was computed")
        if records.POLICY in context.node_config:
            return Message(_wing(DEVICE).train(message, context), reply_to=message)
        experiment = provider(context.run_config)
        _check_same(experiment, message)
        if secure != experiment.config.secure_aggregation:
            raise RecordError("the server and this client do not agree on secure_aggregation; nothing was computed")
        if secure and message.content.config_records[records.SECURE]["phase"] != records.MASKED:
            client = _client(context)
            size = experiment.sizes[client]
            return Message(
                _wing(SECURE_AGGREGATION).phase_reply(client, message.content, context.state, size), reply_to=message
            )
        if experiment.config.tune_malloc:
            tune_allocator()
        request, history = _request(experiment, message, context, unpack)
        with intra_op_threads(experiment.config.threads_per_client):
            result = experiment.client_round(**vars(request))
            content = _reply(experiment, request, result)
            if not secure:
                content = _encoded(experiment, request, message, content)
        unpack.check_untouched()
        _keep(context, history, result)
        if secure:
            content = _wing(SECURE_AGGREGATION).hide(request.client, message.content, context.state, content)
        return Message(content, reply_to=message)

    @client_app.evaluate()
    def evaluate_own(message: Message, context: Context) -> Message:
        if context.run_id != compat.SIMULATION_RUN_ID or records.POLICY in context.node_config:
            # which test examples a client is measured on follows from its label counts, which no epsilon covers
            raise RecordError("a client evaluates in a simulation alone: its share of the test split tells its labels")
        return Message(_own_metric(provider(context.run_config), message, context), reply_to=message)

    return client_app


def _train_together(
    provider: Provider, messages: Sequence[Message], contexts: Sequence[Context], unpack: _Unpack
) -> list[Message] | None:
    experiment = provider(contexts[0].run_config)
    secure = any(records.SECURE in message.content for message in messages)
    if secure or experiment.config.secure_aggregation or any(records.POLICY in c.node_config for c in contexts):
        return None  # ``train`` makes masks and the journals of devices, client by client
    if experiment.config.tune_malloc:
        tune_allocator()
    asked = [_request(experiment, m, c, unpack) for m, c in zip(messages, contexts, strict=True)]
    with intra_op_threads(experiment.config.threads_per_client):
        results = experiment.client_rounds([request for request, _ in asked])
        contents = [
            _encoded(experiment, request, message, _reply(experiment, request, result))
            for (request, _), message, result in zip(asked, messages, results, strict=True)
        ]
    unpack.check_untouched()
    for context, (_, history), result in zip(contexts, asked, results, strict=True):
        _keep(context, history, result)
    return [Message(content, reply_to=message) for content, message in zip(contents, messages, strict=True)]


def _train_stack(
    provider: Provider,
    content: RecordDict,
    run_config: Mapping[str, Any],
    kept: Mapping[int, Kept | None],
    unpack: _Unpack,
) -> StackReply | None:
    experiment = provider(run_config)
    config = experiment.config
    if records.SECURE in content or config.secure_aggregation or config.update_codec != "fp32":
        return None
    if records.read_within(content) is not None:
        return None
    if config.tune_malloc:
        tune_allocator()
    assignment, params = records.read_assignment(content), _model(content, unpack)
    spent: dict[tuple[History, float], History] = {}
    histories, requests = [], []
    for client, one in kept.items():
        history, budget = one.history if one else (), experiment.budgets[client]
        if (history, budget) not in spent:
            spent[history, budget] = _spent(experiment, client, history, assignment)
        histories.append(spent[history, budget])
        requests.append(
            Request(
                client=client,
                assignment=assignment,
                params=params,
                state=one.state if one else None,
                proximal_mu=records.read_proximal_mu(content),
            )
        )
    with intra_op_threads(config.threads_per_client):
        results = experiment.stack_round(requests)
    unpack.check_untouched()
    if results is None:
        return None
    metrics: list[dict[str, float]] = [{records.NUM_EXAMPLES: experiment.sizes[c]} for c in kept]
    if config.release_counts:
        for each, count in zip(metrics, results.nonfinite, strict=True):
            each[records.NONFINITE] = count
    return StackReply(params=results.params, state=results.state, metrics=metrics, histories=histories)


def _model(content: RecordDict, unpack: _Unpack) -> Params:
    params = unpack(content, records.ARRAYS)
    if params is None:
        raise RecordError(f"no {records.ARRAYS!r} to train from")
    return params


def _spent(experiment: Experiment, client: int, history: History, assignment: Assignment) -> History:
    """The client's ``history`` after the round. Raises ``BudgetError`` if the budget is spent."""
    config, event = experiment.config, assignment.event
    if event.privacy_unit == "client":  # noise is the server's, and rounds cost clients that were not drawn too
        return history
    return spend(history, event, experiment.budgets[client], config.delta, config.accountant)


def _request(experiment: Experiment, message: Message, context: Context, unpack: _Unpack) -> tuple[Request, History]:
    """The request of ``message``, and the client's history after it. Raises ``BudgetError`` if the budget is spent."""
    client, assignment = _client(context), records.read_assignment(message.content)
    history = _spent(experiment, client, records.load_history(context.state), assignment)
    params = _model(message.content, unpack)
    request = Request(
        client=client,
        assignment=assignment,
        params=params,
        state=records.load_state(context.state),
        proximal_mu=records.read_proximal_mu(message.content),
        records=records.read_received(message.content, received_by(experiment.half, params), unpack),
    )
    return request, history


def _own_metric(experiment: Experiment, message: Message, context: Context) -> RecordDict:
    """The first metric of the sent model with the layers that the client keeps, on its share of the public test split.

    A metric that is undefined on the share counts as one of no example.
    """
    share, value = torch.from_numpy(experiment.test_shares[_client(context)]), 0.0
    count = len(share)
    if count:
        shared = records.to_params(message.content.array_records[records.ARRAYS])
        params = experiment.own_model(shared, records.load_state(context.state))
        found, _ = measured(experiment.loss_fn.module, params, experiment.dataset.test.rows(share), experiment.task)
        first = found.values[experiment.task.metrics[0].name]
        value, count = (0.0, 0) if isinstance(first, str) else (first, count)
    metrics = MetricRecord({records.METRIC: value, records.NUM_EXAMPLES: count})
    return RecordDict({records.METRICS: metrics})


def _check_same(experiment: Experiment, message: Message) -> None:
    if records.SAME in message.content:  # a simulation asks each worker once, before its first message
        records.check_same(message.content, experiment.fingerprint)


def _reply(experiment: Experiment, request: Request, result: LocalResult) -> RecordDict:
    each = experiment.config.privacy_unit == "client"  # counts once, and its size is private
    size = 1 if each else experiment.sizes[request.client]
    release_counts = experiment.config.release_counts
    return records.reply_content(request.client, request.assignment, result, size, release_counts=release_counts)


def _encoded(experiment: Experiment, request: Request, message: Message, content: RecordDict) -> RecordDict:
    config, within = experiment.config, records.read_within(message.content)
    return codec.encode(content, request.params, config.update_codec, config.update_share, within)


def _keep(context: Context, history: History, result: LocalResult) -> None:
    records.save_history(context.state, history)
    records.save_state(context.state, result.state)


def _client(context: Context) -> int:
    return int(context.node_config[records.PARTITION_ID])


app = make_client_app(from_run_config)
