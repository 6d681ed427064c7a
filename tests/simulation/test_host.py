"""A host adds up the run of a round's clients that it has; runs of any length come to the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.flower import sums
from fed_dpsat.flower.grid import FIRST_NODE_ID
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.simulation.host import Host
from fed_dpsat.simulation.state import StateStore

CLIENTS = 11
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=2))


def app() -> ClientApp:
    """Client c sends random numbers of its own, and declares c + 1 examples."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        drawn = torch.randn(50, generator=torch.Generator().manual_seed(client))
        event = {"client": client, "round": 1, "attempt": 0, **ASSIGNMENT.event.to_dict()}
        content = RecordDict(
            {
                records.ARRAYS: records.to_arrays({"w": drawn}),
                records.EVENT: ConfigRecord(event),
                records.METRICS: MetricRecord({records.NUM_EXAMPLES: client + 1}),
            }
        )
        return Message(content, reply_to=message)

    return app


def total(run: int) -> sums.Part:
    compat.identify_process()
    content = RecordDict(
        {
            records.ARRAYS: records.to_arrays({"w": torch.zeros(50)}),
            records.ASSIGNMENT: records.assignment_record(ASSIGNMENT),
        }
    )
    messages = [Message(content, FIRST_NODE_ID + client, MessageType.TRAIN) for client in range(CLIENTS)]
    host = Host(app(), {}, CLIENTS, StateStore(None))
    parts = []
    for start in range(0, CLIENTS, run):
        parts += host.answers(messages[start : start + run], {}, start=start, release_counts=False).parts
    return sums.merge(parts)


@pytest.mark.parametrize("run", [1, 2, 3, 5, 8])
def test_a_sum_has_the_same_bits_whatever_runs_it_is_of(run, same_bits):
    expected, found = total(CLIENTS), total(run)
    assert list(expected.accepted) == list(found.accepted) == list(range(CLIENTS))
    assert same_bits(found.mean(), expected.mean())
    assert dataclasses.replace(found, total=None) == dataclasses.replace(expected, total=None)
