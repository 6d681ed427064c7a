"""Flower's client handlers and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fed_dpsat.config import RunConfig
from fed_dpsat.experiment import Experiment
from fed_dpsat.flower import codec, on_device, records, secure_client
from fed_dpsat.flower.records import RecordError
from fed_dpsat.plans import spend
from fed_dpsat.process import intra_op_threads, tune_allocator

Provider = Callable[[Mapping[str, Any]], Experiment]
"""Flower's run config to the experiment that this process works on."""


@lru_cache(maxsize=1)
def _experiment(settings: tuple[tuple[str, Any], ...]) -> Experiment:
    return Experiment.build(RunConfig.from_mapping(dict(settings)))


def from_run_config(run_config: Mapping[str, Any]) -> Experiment:
    """The experiment that the run config names, built once per process."""
    return _experiment(tuple(sorted(run_config.items())))


def make_client_app(provider: Provider) -> ClientApp:
    """A client that trains on the experiment of ``provider``, under the partition its node is configured with."""
    client_app = ClientApp()

    @client_app.query()
    def identify(message: Message, context: Context) -> Message:
        if on_device.POLICY in context.node_config:
            return on_device.identify(message, context)
        experiment, client = provider(context.run_config), _client(context)
        return Message(records.identity_content(client, len(experiment.partitions[client])), reply_to=message)

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        secure = secure_client.SECURE in message.content.config_records
        if secure and on_device.POLICY in context.node_config:
            raise RecordError("a device with a policy takes no part in secure aggregation yet; nothing was computed")
        if on_device.POLICY in context.node_config:
            return on_device.train(message, context)
        experiment, client = provider(context.run_config), _client(context)
        if secure != experiment.config.secure_aggregation:
            raise RecordError("the server and this client do not agree on secure_aggregation; nothing was computed")
        if secure and message.content.config_records[secure_client.SECURE]["phase"] != secure_client.MASKED:
            size = len(experiment.partitions[client])
            return Message(secure_client.answer(client, message.content, context.state, size), reply_to=message)
        if experiment.config.tune_malloc:
            tune_allocator()
        config = experiment.config
        task = records.read_task(message.content)
        history = spend(
            records.load_history(context.state), task.event, experiment.budgets[client], config.delta, config.accountant
        )
        ascent = message.content.array_records.get(records.ASCENT)
        params = records.to_params(message.content.array_records[records.ARRAYS])
        with intra_op_threads(experiment.config.threads_per_client):
            result = experiment.client_round(
                client,
                task,
                params,
                records.load_state(context.state),
                None if ascent is None else records.to_params(ascent),
                records.read_proximal_mu(message.content),
            )
        records.save_history(context.state, history)
        records.save_state(context.state, result.state)
        content = records.reply_content(
            client, task, result, len(experiment.partitions[client]), release_counts=config.release_counts
        )
        if secure:
            content = secure_client.hide(client, message.content, context.state, content)
        else:
            content = codec.encode(content, params, config.update_codec, config.update_share)
        return Message(content, reply_to=message)

    return client_app


def _client(context: Context) -> int:
    return int(context.node_config[records.PARTITION_ID])


app = make_client_app(from_run_config)
