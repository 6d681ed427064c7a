"""The only judge of a client's reply, at the server and in workers that add replies up.

A valid reply answers its message, names the charged event, and holds a model with the shapes of the sent one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict

from fed_dpsat.client.unit import excess
from fed_dpsat.flower.wire import codec, compat, records
from fed_dpsat.flower.wire.records import RecordError
from fed_dpsat.params import Params

BYTES = "bytes"
"""The size of a reply's arrays, beside its metrics."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The reason why a reply does not count: it is invalid, its client failed, or its client was absent.

    A run ends if it has only replies of the first two kinds (``RoundReport.count_failure``).
    """

    reason: str
    kind: Literal["invalid", "failed", "absent"] = "invalid"

    @classmethod
    def of_error(cls, reason: str | None, code: int) -> Failure:
        """The failure that an error of Flower or of this package stands for."""
        return cls(reason=f"failed: {reason}", kind="absent" if code in compat.ABSENT else "failed")


Verdict = Mapping[str, float] | Failure
"""The metrics of a valid reply, or the failure."""

Verdicts = Mapping[int, Verdict]
"""By client."""


def judge(
    reply: Message,
    asked: RecordDict,
    client: int,
    *,
    release_counts: bool,
    clip_norm: float | None = None,
    like: ArrayRecord | None = None,
) -> Verdict:
    """The verdict on a ``reply`` of ``client`` to the message with the content ``asked``; a valid reply is decoded.

    ``asked`` is the content of the question: the assignment with the charged event, the model, the subspace that the
    round can change, and the forms of what a client's half sends. A valid model has the names, shapes and types of
    ``like``, or else of the model in ``asked``. With a ``clip_norm``, a model farther than that from it is invalid.
    Raises ``RecordError`` for an ``asked`` without an assignment.
    """
    assignment = records.read_assignment(asked)
    if reply.has_error():
        return Failure.of_error(reply.error.reason, reply.error.code)
    received = codec.num_bytes(reply.content)
    try:
        model = records.arrays_in(asked, records.ARRAYS) if like is None else like
        if model is None:
            raise RecordError(f"the strategy sent no {records.ARRAYS!r} to train from")
        reply.content = codec.decode(reply.content, model, records.read_within(asked))
        said_client, said_round, attempt, event = records.read_event(reply.content)
        if (said_client, said_round, attempt) != (client, assignment.round, assignment.attempt):
            raise RecordError(
                f"says client {said_client}, round {said_round}, attempt {attempt}; "
                f"asked was client {client}, round {assignment.round}, attempt {assignment.attempt}"
            )
        if event != assignment.event:
            raise RecordError(f"its event {event} is not the one that was charged, {assignment.event}")
        metrics = records.read_metrics(reply.content, release_counts=release_counts)
        records.check_arrays(reply.content, model, records.read_sends(asked))
        if clip_norm is not None:
            _check_move(reply.content, model, clip_norm)
    except RecordError as error:
        return Failure(reason=str(error))
    return {**metrics, BYTES: received}


def judge_stack(
    params: Params, asked: RecordDict, clients: Sequence[int], metrics: Sequence[Mapping[str, float]]
) -> list[Verdict]:
    """The verdicts on ``params[K, ...]`` of ``clients`` that trained together in this process, for ``asked``.

    ``metrics`` are those of their replies. The event that ran is the charged one, or there would be no ``params``.
    Raises ``RecordError`` for an ``asked`` without a model, and for other names, shapes or types than its.
    """
    like = records.arrays_in(asked, records.ARRAYS)
    if like is None:
        raise RecordError(f"the strategy sent no {records.ARRAYS!r} to train from")
    names = {name: (tuple(p.shape[1:]), p[0].numpy().dtype) for name, p in params.items()}
    forms = {name: (tuple(array.shape), np.dtype(array.dtype)) for name, array in compat.items(like)}
    if list(names.items()) != list(forms.items()):
        raise RecordError("other parameters than the model's")
    fine = torch.ones(len(clients), dtype=torch.bool)
    for p in params.values():
        if p.numel():
            fine &= p.reshape(len(clients), -1).abs().amax(1).double() <= records.MOST  # NaN is not
    received = sum(p[0].nbytes for p in params.values())
    return [
        {**of_one, BYTES: received} if valid else _refused({name: p[k] for name, p in params.items()}, like)
        for k, (valid, of_one) in enumerate(zip(fine.tolist(), metrics, strict=True))
    ]


def _refused(params: Params, like: ArrayRecord) -> Failure:
    try:
        records.check_arrays(RecordDict({records.ARRAYS: records.to_arrays(params)}), like)
    except RecordError as error:
        return Failure(reason=str(error))
    raise AssertionError("a reply that is beyond the bound in a stack is within it alone")


def _check_move(content: RecordDict, like: ArrayRecord, clip_norm: float) -> None:
    after, before = records.to_read(content.array_records[records.ARRAYS]), records.to_read(like)
    if beyond := excess(after, before, clip_norm):
        raise RecordError(f"its change has a norm of {clip_norm + beyond:.6g}, beyond clip_norm={clip_norm:g}")
