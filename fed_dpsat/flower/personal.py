"""How good clients' own models are, on their shares of the public test split; asked in a simulation alone.

A client answers with the model that the server would send it and the head that it keeps. Which test examples it is
measured on follows from the label counts of its data, which no epsilon covers: outside a simulation there is no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict

from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import evaluate, worst_decile
from fed_dpsat.data.dataset import Examples
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.flower.wire.records import RecordError

ACCURACY = "accuracy"


def answer(provider: Callable[[Mapping[str, Any]], Experiment], message: Message, context: Context) -> RecordDict:
    """Accuracy and size of the client's share; outside a simulation ``RecordError``, and nothing is built."""
    if context.run_id != compat.SIMULATION_RUN_ID or records.POLICY in context.node_config:
        raise RecordError("a client evaluates in a simulation alone: its share of the test split tells of its labels")
    experiment = provider(context.run_config)
    share = experiment.test_shares[int(context.node_config[records.PARTITION_ID])]
    accuracy = 0.0
    if len(share):
        shared = records.to_params(message.content.array_records[records.ARRAYS])
        params = experiment.whole(shared, records.load_state(context.state))
        accuracy = evaluate(experiment.loss_fn.module, params, _rows(experiment.dataset.test, share)).accuracy
    return RecordDict({records.METRICS: MetricRecord({ACCURACY: accuracy, records.NUM_EXAMPLES: len(share)})})


def measure(grid: SimulationGrid, arrays: ArrayRecord, num_clients: int) -> dict[str, float | int]:
    """Mean and worst decile of clients' accuracies, and of how many: those whose share of the test split is not empty.

    Every client is asked, also one that never trained, whose head is the initial one. Raises ``FederationError`` where
    one fails.
    """
    content = RecordDict({records.ARRAYS: arrays})
    nodes = grid.nodes_by_client(num_clients).values()
    replies = grid.stream([Message(content, node, MessageType.EVALUATE) for node in nodes])
    return summarised(_accuracies(replies))


def summarised(accuracies: Mapping[int, float]) -> dict[str, float | int]:
    """As they stand in ``rounds.jsonl``."""
    found = list(accuracies.values())
    return {
        "personal_accuracy": sum(found) / len(found),
        "personal_worst_decile": worst_decile(found),
        "personal_clients": len(found),
    }


def _accuracies(replies: Iterable[Message]) -> dict[int, float]:
    found: dict[int, float] = {}
    for reply in replies:
        client = reply.metadata.src_node_id
        if reply.has_error():
            raise FederationError(f"node {client} could not evaluate its own model: {reply.error.reason}")
        metrics = reply.content.metric_records[records.METRICS]
        if metrics[records.NUM_EXAMPLES]:
            found[client] = float(metrics[ACCURACY])  # type: ignore[arg-type]
    return found


def _rows(examples: Examples, share: object) -> Examples:
    rows = torch.as_tensor(share)
    return Examples(inputs=examples.inputs[rows], labels=examples.labels[rows], mean=examples.mean, std=examples.std)
