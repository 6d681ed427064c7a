"""The few internals of Flower 1.41 that a grid of our own needs, in one place.

Flower has no public way to run a simulation in process or to plug a backend in (FLOWER.md). What is touched:
``TaskIdentity`` (without it ``Message(...)`` raises), ``Run``, ``ErrorCode``, and the id in a message's metadata.
``tests/flower/test_compat.py`` says which of them broke when the version range in pyproject.toml is raised.
"""

from __future__ import annotations

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SIMULATION_RUN_ID = 1
SERVER_NODE_ID = 1


def identify_process(run_id: int = SIMULATION_RUN_ID, node_id: int = SERVER_NODE_ID) -> None:
    """Say on whose behalf this process creates messages."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = 1


def empty_run(run_id: int = SIMULATION_RUN_ID) -> Run:
    """A run without an app bundle."""
    return Run.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that the SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = message_id


__all__ = [
    "SERVER_NODE_ID",
    "SIMULATION_RUN_ID",
    "ErrorCode",
    "Run",
    "empty_run",
    "identify_process",
    "set_message_id",
]
