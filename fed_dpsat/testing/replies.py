"""Invalid replies, which must not affect a strategy: each changes an honest one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fed_dpsat.flower.wire import records
from fed_dpsat.testing.federation import NUM_CLIENTS, Tamper, as_model, as_record, start

BAD_CLIENT = 2


def from_bad_client(spoil: Callable[[RecordDict], RecordDict]) -> Tamper:
    """Spoil the replies of one client."""
    return lambda client, number, reply: spoil(reply) if client == BAD_CLIENT else reply


def fail(reply: RecordDict) -> RecordDict:
    """The client raises an exception."""
    raise RuntimeError("a client that fails")


def nan(reply: RecordDict) -> RecordDict:
    """One NaN in a 0-d array."""
    return _replaced(reply, scale=np.array(np.nan, dtype=np.float32))


def _replaced(reply: RecordDict, **arrays: object) -> RecordDict:
    model = {**as_model(reply.array_records[records.ARRAYS]), **arrays}
    reply[records.ARRAYS] = ArrayRecord({name: Array(np.asarray(a)) for name, a in model.items()})
    return reply


BAD: dict[str, Callable[[RecordDict], RecordDict]] = {
    "NaN": nan,
    "inf": lambda reply: _replaced(reply, w=np.full(NUM_CLIENTS, np.inf, dtype=np.float32)),
    "a wrong shape": lambda reply: _replaced(reply, w=np.ones((NUM_CLIENTS, 1), dtype=np.float32)),
    "a wrong type": lambda reply: _replaced(reply, w=np.ones(NUM_CLIENTS)),
    "a million numbers too many": lambda reply: _replaced(reply, w=np.ones(10**6, dtype=np.float32)),
    "numbers that cannot be squared": lambda reply: _replaced(reply, w=np.full(NUM_CLIENTS, 1e30, dtype=np.float32)),
    "a parameter too many": lambda reply: _replaced(reply, extra=np.ones(1, dtype=np.float32)),
    "a second model": lambda reply: RecordDict({**reply, "again": as_record(start())}),
    "no event": lambda reply: RecordDict({key: reply[key] for key in reply if key != records.EVENT}),
    "a negative size": lambda reply: RecordDict({**reply, records.METRICS: MetricRecord({records.NUM_EXAMPLES: -1.0})}),
}


def _spoiled_records(spoil: Callable[[Array], Array | None]) -> Callable[[RecordDict], RecordDict]:
    """Change the first array of each record of a client's half; None leaves the record out."""

    def changed(reply: RecordDict) -> RecordDict:
        for key in set(reply.array_records) - {records.ARRAYS}:
            arrays = dict(reply.array_records[key])
            name, first = next(iter(arrays.items()))
            if (instead := spoil(first)) is None:
                del reply[key]
            else:
                reply[key] = ArrayRecord({**arrays, name: instead})
        return reply

    return changed


BAD_RECORDS: dict[str, Callable[[RecordDict], RecordDict]] = {
    "NaN in a record": _spoiled_records(lambda a: Array(np.full(a.shape, np.nan, a.dtype))),
    "a record of a wrong shape": _spoiled_records(lambda a: Array(np.ones((2, *a.shape), a.dtype))),
    "a record too few": _spoiled_records(lambda a: None),
}
"""Of a strategy whose client's half sends records."""
