"""The internals of Flower that the simulation grid needs; only this package uses any (``node`` has those of a device).

Flower has no public way to run a simulation in process or to plug in a backend. The package uses
``TaskIdentity`` (without it ``Message(...)`` raises), ``Run``, ``ErrorCode``, the logger, the id in a message's
metadata, the dictionary in an ``ArrayRecord``, and the fields of ``Array``: Flower's own serialises when it is made,
which costs a client that stays in the process a millisecond per megabyte and copy. ``versions`` has the tested
releases; if an internal is missing, ``FlowerError`` names it before any charge.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import ItemsView, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import flwr.app
import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from numpy.typing import NDArray

from fed_dpsat.flower.wire.compat.versions import FlowerError, internals, say_untested

with internals():
    from flwr.common.constant import ErrorCode, SType
    from flwr.common.logger import FLOWER_LOGGER
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

SIMULATED_FAULT = 1000
"""The error code of a client that drops out or is late in a simulation; Flower does not use it."""
ABSENT = frozenset(
    {
        SIMULATED_FAULT,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.MESSAGE_UNAVAILABLE,
    }
)
"""Error codes of absent clients: they are no evidence of a fault of the client."""
OWN_LEVEL = logging.DEBUG
"""The level that Flower gives its logger; its handler leaves out what is below INFO."""
SIMULATION_RUN_ID = 1
SERVER_NODE_ID = 1


@functools.cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """``str(dtype)``, which takes numpy as long as all else of an ``Array``."""
    return str(dtype)


class Array(flwr.app.Array):
    """A Flower array that holds its ndarray; the bytes are made when something asks for them, such as a network.

    Flower writes the name of the class into messages. ``ndarray`` is not copied; no caller may change it afterwards.
    """

    def __init__(self, ndarray: NDArray[Any]) -> None:
        held = ndarray.view()
        held.flags.writeable = False
        self.__dict__.update(dtype=dtype_name(held.dtype), shape=tuple(held.shape), stype=SType.NUMPY, held=held)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The bytes that Flower sends."""
        if "serialised" not in self.__dict__:
            self.__dict__["serialised"] = flwr.app.Array(self.view()).data
        data: bytes = self.__dict__["serialised"]
        return data

    def view(self) -> NDArray[Any]:
        """The array itself, read-only."""
        held: NDArray[Any] = self.__dict__["held"]
        return held

    def numpy(self) -> NDArray[Any]:
        """A copy, as from Flower's own."""
        return self.view().copy()

    def __reduce__(self) -> tuple[type[Array], tuple[NDArray[Any]]]:
        return Array, (self.view(),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, flwr.app.Array) and _fields(self) == _fields(other)

    __hash__ = None  # type: ignore[assignment]  # as Flower's own


def record_of(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """``arrays`` in a record that holds them. (``ArrayRecord(dict)`` serialises each, setting items checks types.)"""
    record = ArrayRecord()
    record.__dict__["_data"].update({name: Array(array) for name, array in arrays.items()})
    return record


def items(record: ArrayRecord) -> ItemsView[str, flwr.app.Array]:
    """``record.items()``, of the dictionary behind it."""
    found: dict[str, flwr.app.Array] = record.__dict__["_data"]
    return found.items()


def view(array: flwr.app.Array) -> NDArray[Any]:
    """The values of ``array``, to read: without a copy if it holds them."""
    return array.view() if isinstance(array, Array) else np.asarray(array.numpy())


def _fields(array: flwr.app.Array) -> tuple[object, ...]:
    return array.dtype, tuple(array.shape), array.stype, array.data


def identify_process(run_id: int = SIMULATION_RUN_ID, node_id: int = SERVER_NODE_ID) -> None:
    """Say on whose behalf this process creates messages; raises ``FlowerError`` if Flower does not listen."""
    act_for(run_id, node_id, 1)
    check_records()


def act_for(run_id: int, node_id: int, task_id: int) -> None:
    """``identify_process`` for one task."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


def check_records() -> None:
    """Raise ``FlowerError`` unless messages and records keep the values that this package sets in them."""
    try:
        metadata = Message(RecordDict(), SERVER_NODE_ID, MessageType.TRAIN).metadata
    except Exception as error:  # whatever a message asks for that it did not before
        raise FlowerError(f"message for this TaskIdentity ({error})") from error
    wanted = {
        "TaskIdentity.run_id": metadata.run_id == TaskIdentity.run_id,
        "TaskIdentity.node_id": metadata.src_node_id == TaskIdentity.node_id,
        "Metadata._message_id": "_message_id" in metadata.__dict__,
        "ArrayRecord._data": "_data" in ArrayRecord().__dict__,
        "Run.create_empty": hasattr(Run, "create_empty"),
    }
    for name, there in wanted.items():
        if not there:
            raise FlowerError(name)


@contextmanager
def as_before() -> Iterator[None]:
    """On whose behalf this process creates messages is afterwards as it was before."""
    names = ("_run_id", "_node_id", "_task_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


@contextmanager
def without_info() -> Iterator[None]:
    """Leave out Flower's lines of INFO, two a round, unless somebody has set the level of its logger."""
    with at_level(logging.WARNING if FLOWER_LOGGER.level == OWN_LEVEL else FLOWER_LOGGER.level):
        yield


@contextmanager
def at_level(level: int) -> Iterator[None]:
    """Show Flower's lines of ``level`` and above."""
    before = FLOWER_LOGGER.level
    FLOWER_LOGGER.setLevel(level)
    try:
        yield
    finally:
        FLOWER_LOGGER.setLevel(before)


def empty_run(run_id: int = SIMULATION_RUN_ID) -> Run:
    """A run without an app bundle."""
    return Run.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that the SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = message_id


__all__ = [
    "ABSENT",
    "SERVER_NODE_ID",
    "SIMULATED_FAULT",
    "SIMULATION_RUN_ID",
    "Array",
    "ErrorCode",
    "FlowerError",
    "Run",
    "SType",
    "act_for",
    "as_before",
    "check_records",
    "dtype_name",
    "empty_run",
    "identify_process",
    "items",
    "record_of",
    "say_untested",
    "set_message_id",
    "view",
    "without_info",
]
