"""What makes a client's reply valid: it is about what was asked and charged, and its model is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flwr.app import ArrayRecord, Message, RecordDict

from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.unit import excess
from fed_dpsat.flower.wire import codec, compat, records
from fed_dpsat.flower.wire.records import RecordError
from fed_dpsat.step.subspace import Coordinates, Span

BYTES = "bytes"
"""The size of a reply's arrays, beside its metrics."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a reply does not count: it is invalid, the client failed, or it was absent, which says nothing of it.

    A run ends where all replies are of the first two (``RoundReport.count_failure``).
    """

    reason: str
    kind: Literal["invalid", "failed", "absent"] = "invalid"

    @classmethod
    def of_error(cls, reason: str | None, code: int) -> Failure:
        """What an error of Flower's or ours stands for."""
        return cls(reason=f"failed: {reason}", kind="absent" if code in compat.ABSENT else "failed")


def judge(
    reply: Message,
    *,
    client: int,
    assignment: Assignment,
    like: ArrayRecord,
    release_counts: bool,
    clip_norm: float | None = None,
    within: Coordinates | Span | None = None,
) -> dict[str, float] | Failure:
    """The metrics of a valid reply of ``client`` to ``assignment``, whose model is like ``like``; else what is wrong.

    With a ``clip_norm``, a model that is farther from ``like`` is none. ``within`` is what the server said that the
    round can change.
    """
    if reply.has_error():
        return Failure.of_error(reply.error.reason, reply.error.code)
    received = codec.num_bytes(reply.content)
    try:
        reply.content = codec.decode(reply.content, like, within)
        said_client, said_round, attempt, event = records.read_event(reply.content)
        if (said_client, said_round, attempt) != (client, assignment.round, assignment.attempt):
            raise RecordError(
                f"says client {said_client}, round {said_round}, attempt {attempt}; "
                f"asked was client {client}, round {assignment.round}, attempt {assignment.attempt}"
            )
        if event != assignment.event:
            raise RecordError(f"its event {event} is not the one that was charged, {assignment.event}")
        metrics = records.read_metrics(reply.content, release_counts=release_counts)
        records.check_arrays(reply.content, like)
        if clip_norm is not None:
            _check_move(reply.content, like, clip_norm)
    except RecordError as error:
        return Failure(reason=str(error))
    return {**metrics, BYTES: received}


def _check_move(content: RecordDict, like: ArrayRecord, clip_norm: float) -> None:
    after, before = records.to_read(content.array_records[records.ARRAYS]), records.to_read(like)
    if beyond := excess(after, before, clip_norm):
        raise RecordError(f"its change has a norm of {clip_norm + beyond:.6g}, beyond clip_norm={clip_norm:g}")
