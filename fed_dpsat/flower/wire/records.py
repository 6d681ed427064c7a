"""The records of all messages, each key defined once.

======================== ============ ============================================ =============
record                   type         content                                      direction
======================== ============ ============================================ =============
``arrays``               ArrayRecord  the parameters that are trained              both
``config``               ConfigRecord settings of the inner strategy               to the client
``fed_dpsat.assignment`` ConfigRecord round, attempt and the PrivacyEvent it costs to the client
``fed_dpsat.subspace``   ConfigRecord the subspace of the round, if it has one     to the client
``fed_dpsat.sends``      ConfigRecord forms of what a client's half sends          to the client
``fed_dpsat.event``      ConfigRecord client, round, attempt and the PrivacyEvent  to the server
``metrics``              MetricRecord ``num-examples``, declared public            to the server
``fed_dpsat.secure``     ConfigRecord a phase of secure aggregation, if asked for  both
``fed_dpsat.identity``   ConfigRecord client, num_examples, protocol of a node     to the server
``fed_dpsat.protocol``   ConfigRecord protocol and version of the server           to the client
``fed_dpsat.same``       ConfigRecord fingerprint of the server's experiment; form to the client
of a half's own name     ArrayRecord  what a client's half receives, or sends      both
======================== ============ ============================================ =============

Nothing that was computed on private data leaves a client but ``arrays`` and what a client's half makes of the same
noised values; and, only if the setting ``release_counts`` asks for it, ``nonfinite-examples`` in ``metrics``. In a
simulation, a client with a model or layers of its own also answers with their ``accuracy``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Message,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from numpy.typing import NDArray
from torch import Tensor

from fed_dpsat.accounting.event import History, PrivacyEvent, merge
from fed_dpsat.client import protocol
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.flower.wire import compat
from fed_dpsat.flower.wire.arrays import read_array
from fed_dpsat.params import Params, flatten, unflatten
from fed_dpsat.step.loop import LocalResult
from fed_dpsat.step.optimizers.base import State
from fed_dpsat.step.subspace import Coordinates, Span, described, read_subspace

ARRAYS = "arrays"
METRICS = "metrics"
NUM_EXAMPLES = "num-examples"
NONFINITE = "nonfinite-examples"
METRIC = "metric"
ASSIGNMENT = "fed_dpsat.assignment"
SUBSPACE = "fed_dpsat.subspace"
SENDS = "fed_dpsat.sends"
EVENT = "fed_dpsat.event"
IDENTITY = "fed_dpsat.identity"
PROTOCOL = "fed_dpsat.protocol"
SAME = "fed_dpsat.same"
STATE = "fed_dpsat.state"
HISTORY = "fed_dpsat.history"
SECURE = "fed_dpsat.secure"
MASKED = "masked"
"""The phase of secure aggregation in which a client trains, and the array that it sends then."""

Read = Callable[[RecordDict, str], Params | None]
"""Reads an array record of a message."""

NO_FORMS: Mapping[str, Any] = {}

PARTITION_ID = "partition-id"
POLICY = "policy"
"""Keys of a node's configuration: the client that it holds; the file that makes it a device."""


LARGEST = 1e14
"""Beyond it no reply is one: the squares of a billion such numbers still add up in float32."""
MOST = LARGEST * (1 + 1e-6)
"""As a float32, ``LARGEST`` is a little more."""


class Form(NamedTuple):
    """The shape and type of an array."""

    shape: tuple[int, ...]
    dtype: str


class RecordError(ValueError):
    """An invalid message; the text gives the missing or wrong part."""


with warnings.catch_warnings():  # torch warns once in a process about read-only arrays
    warnings.simplefilter("ignore")
    torch.from_numpy(np.broadcast_to(np.float32(0), 1))


def to_arrays(params: Params) -> ArrayRecord:
    """Tensors to Flower arrays of their shapes and types, in shared memory that no caller may change afterwards."""
    return compat.record_of({name: p.detach().cpu().numpy() for name, p in params.items()})


def to_read(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Flower arrays to tensors that are only read; without a copy if the arrays hold their values."""
    return {name: torch.from_numpy(compat.view(array)) for name, array in compat.items(arrays)}


def to_params(arrays: ArrayRecord) -> Params:
    """Flower arrays to tensors that own their memory."""
    return {name: torch.from_numpy(array.numpy()) for name, array in compat.items(arrays)}


def arrays_in(content: RecordDict, key: str) -> ArrayRecord | None:
    """The array record ``key``, or None. (``content.array_records`` makes a dictionary of all, tenths of a ms each.)"""
    record = content.get(key)
    return record if isinstance(record, ArrayRecord) else None


def config_in(content: RecordDict, key: str) -> ConfigRecord | None:
    """The config record ``key``, or None."""
    record = content.get(key)
    return record if isinstance(record, ConfigRecord) else None


def assignment_record(assignment: Assignment) -> ConfigRecord:
    """The assignment with its charged event, for a message."""
    return ConfigRecord(dict(assignment.to_dict()))


def read_assignment(content: RecordDict) -> Assignment:
    """The assignment in a message; raises ``RecordError`` for an incomplete one."""
    record = _config(content, ASSIGNMENT)
    try:
        return Assignment.from_dict(record)
    except ValueError as error:
        raise RecordError(f"{ASSIGNMENT}: {error}") from None


def subspace_record(subspace: Coordinates | Span) -> ConfigRecord:
    """The subspace of a round, for a message: the client writes its reply in it, and the server reads it so."""
    return ConfigRecord(described(subspace))


def read_within(content: RecordDict) -> Coordinates | Span | None:
    """The subspace in a message; None if the reply is a whole model.

    Raises ``RecordError`` for a record that describes no subspace, or has other steps than the assignment: the server
    would refuse the reply.
    """
    if config_in(content, SUBSPACE) is None:
        return None
    try:
        found = read_subspace(_config(content, SUBSPACE))
    except ValueError as error:
        raise RecordError(f"{SUBSPACE}: {error}") from None
    if isinstance(found, Span) and found.steps != (steps := read_assignment(content).local_steps):
        raise RecordError(f"{SUBSPACE}: {found.steps} steps, and {steps} in {ASSIGNMENT!r}")
    return found


def sends_content(sends: Mapping[str, Params]) -> RecordDict:
    """What a client's half sends beside the model, as forms for a message; empty for nothing."""
    if not sends:
        return RecordDict()
    forms = {
        name: json.dumps([[key, list(a.shape), a.dtype] for key, a in compat.items(to_arrays(tensors))])
        for name, tensors in sends.items()
    }
    return RecordDict({SENDS: ConfigRecord(dict(forms))})


def read_sends(content: RecordDict) -> dict[str, dict[str, Form]]:
    """The forms of ``sends_content`` in a message, by record and name."""
    said: Mapping[str, object] = config_in(content, SENDS) or {}
    return {
        name: {key: Form(tuple(shape), dtype) for key, shape, dtype in json.loads(str(forms))}
        for name, forms in said.items()
    }


def read_received(content: RecordDict, receives: Mapping[str, Params], read: Read) -> dict[str, Params]:
    """The records that a client's half ``receives``, by ``read``; raises ``RecordError`` for a missing or wrong one."""
    found = {}
    for key, like in receives.items():
        params = read(content, key)
        if params is None:
            raise RecordError(f"no {key!r} from the strategy, which the client's half receives")
        if {n: (p.shape, p.dtype) for n, p in params.items()} != {n: (p.shape, p.dtype) for n, p in like.items()}:
            raise RecordError(f"{key!r} from the strategy has other arrays than the client's half receives")
        found[key] = params
    return found


def read_proximal_mu(content: RecordDict) -> float:
    """The proximal weight of stock FedProx; 0 for another strategy. Raises ``RecordError`` for a value below 0."""
    record = config_in(content, "config")
    mu = 0.0 if record is None else record.get("proximal-mu", 0.0)
    if not isinstance(mu, int | float) or not 0 <= mu < float("inf"):
        raise RecordError(f"proximal-mu={mu!r} is not in [0, inf)")
    return float(mu)


def reply_content(
    client: int, assignment: Assignment, result: LocalResult, num_examples: int, *, release_counts: bool = False
) -> RecordDict:
    """The reply of a client: noised parameters, their event, and the public size. Nothing else leaves a client.

    The records of a client's half are made of noised values too. Under the unit "client" the parameters are bounded,
    and the trusted server noises them. With ``release_counts`` the reply also has the number of examples without a
    finite gradient: an exact release that no event covers.
    """
    metrics: dict[str, MetricRecordValues] = {NUM_EXAMPLES: num_examples}
    if release_counts:
        metrics[NONFINITE] = result.nonfinite_examples
    event: dict[str, ConfigRecordValues] = {**result.event.to_dict()}
    event |= {"client": client, "round": assignment.round, "attempt": assignment.attempt}
    return RecordDict(
        {
            ARRAYS: to_arrays(result.params),
            **{name: to_arrays(tensors) for name, tensors in result.records.items()},
            EVENT: ConfigRecord(event),
            METRICS: MetricRecord(metrics),
        }
    )


def read_event(content: RecordDict) -> tuple[int, int, int, PrivacyEvent]:
    """``(client, round, attempt, event)`` of a reply; raises ``RecordError`` without one."""
    values = _config(content, EVENT)
    try:
        client, round, attempt = (values.pop(key) for key in ("client", "round", "attempt"))
        return client, round, attempt, PrivacyEvent.from_dict(values)
    except (KeyError, ValueError) as error:
        raise RecordError(f"no valid privacy event ({error})") from None


def check_arrays(content: RecordDict, like: ArrayRecord, sends: Mapping[str, Mapping[str, Form]] = NO_FORMS) -> None:
    """Raise ``RecordError`` unless the reply's arrays are finite and have the names, shapes and types of ``like``.

    The reply has the records that the client's half ``sends`` too, checked alike, and no other arrays.
    """
    found = {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}
    expected = {ARRAYS, *sends}
    if found.keys() != expected:
        raise RecordError(f"array records {sorted(found)}, expected {', '.join(map(repr, sorted(expected)))} alone")
    forms = {name: Form(tuple(array.shape), array.dtype) for name, array in compat.items(like)}
    for key, wanted in {ARRAYS: forms, **sends}.items():
        _check_record(found[key], wanted, "" if key == ARRAYS else f"{key}: ")


def _check_record(record: ArrayRecord, wanted: Mapping[str, Form], where: str) -> None:
    if list(record) != list(wanted):
        raise RecordError(f"{where}other parameters than the model's")
    for name, array in compat.items(record):
        expected = wanted[name]
        if Form(tuple(array.shape), array.dtype) != expected:
            said, form = f"{array.dtype}{list(array.shape)}", f"{expected.dtype}{list(expected.shape)}"
            raise RecordError(f"{where}{name} is {said}, not {form}")
        try:
            values = _values(array, expected)
        except ValueError as error:
            raise RecordError(f"{where}{name} {error}") from None
        if values.dtype.kind == "u" or _is_small(values):  # masked: any number is one
            continue
        if values.dtype.kind not in "fib":
            raise RecordError(f"{where}{name} has {values.dtype} numbers, which have no order")
        if not (float(values.max(initial=0)) <= MOST and float(values.min(initial=0)) >= -MOST):  # NaN is neither
            what = f"numbers beyond {LARGEST:g}" if np.isfinite(values).all() else "NaN or inf"
            raise RecordError(f"{where}{name} has {what}")


def _is_small(values: NDArray[Any]) -> bool:
    """Whether one pass shows that no number is beyond ``LARGEST``: a rounded sum of squares is at least each square."""
    return values.dtype.kind == "f" and float(np.vdot(values, values)) <= LARGEST  # float16 has no such number


def _values(array: Array, like: Form) -> NDArray[Any]:
    """The values of ``array``, to read; ``ValueError`` if they do not have the shape and type that it declares."""
    if not isinstance(array, compat.Array):
        return read_array(array, like.shape, np.dtype(like.dtype))
    values = array.view()
    if values.shape != like.shape or compat.dtype_name(values.dtype) != like.dtype:
        raise ValueError(f"holds {values.dtype}{list(values.shape)}, which is not what it says")
    return values


def read_metrics(content: RecordDict, *, release_counts: bool = False) -> dict[str, float]:
    """The declared size, and the count if it may be released; raises ``RecordError`` for a missing or invalid one."""
    allowed = [NUM_EXAMPLES, NONFINITE] if release_counts else [NUM_EXAMPLES]
    found = content.get(METRICS)
    metrics: Any = found if isinstance(found, MetricRecord) else {}
    count = sum(isinstance(record, MetricRecord) for record in content.values())
    if list(metrics) != allowed or count != 1:
        raise RecordError(f"metrics are not {', '.join(allowed)} alone")
    num_examples = metrics[NUM_EXAMPLES]
    if not isinstance(num_examples, int | float) or not 0 < num_examples < float("inf"):
        raise RecordError(f"{NUM_EXAMPLES}={num_examples} is not above 0")
    if release_counts and not isinstance(metrics[NONFINITE], int):
        raise RecordError(f"{NONFINITE}={metrics[NONFINITE]} is no count")
    return dict(metrics)


def same_content(same: Mapping[str, str]) -> RecordDict:
    """What the server's process has to have in common with a client's, for a message; empty for nothing."""
    return RecordDict({SAME: ConfigRecord(dict(same)), **protocol_content()} if same else {})


def protocol_content() -> RecordDict:
    """The protocol of this process, for a message."""
    return RecordDict({PROTOCOL: ConfigRecord({**protocol.stated()})})


def check_protocol(content: RecordDict, own: str) -> None:
    """Raise ``RecordError`` unless the server states the protocol of this process, which is called ``own``."""
    if said := protocol.difference(config_in(content, PROTOCOL) or {}, "the server has", f"{own} has"):
        raise RecordError(f"{said}; install the same version on both. Nothing was computed or charged here")


def check_same(content: RecordDict, fingerprint: str) -> None:
    """Raise ``RecordError`` if the message has a fingerprint, and that or its protocol is another one."""
    record = config_in(content, SAME)
    if record is None:
        return
    check_protocol(content, "this client")
    if record.get("sha256") != fingerprint:
        raise RecordError(
            "this process made other data, another partition or other frozen weights of the run's names than the "
            "server: a plug-in has to make the same each time, from the seed that it is given; a node with data of "
            "its own needs a policy. Nothing was computed"
        )


def identity_content(client: int, num_examples: int) -> RecordDict:
    """The identity of a node: its client, the size of that client, and its protocol."""
    own: dict[str, ConfigRecordValues] = {"client": client, "num_examples": num_examples, **protocol.stated()}
    return RecordDict({IDENTITY: ConfigRecord(own)})


def read_identity(reply: Message) -> int:
    """The client of a node; raises ``RecordError`` for a reply without one, or of another protocol."""
    if reply.has_error():
        raise RecordError(reply.error.reason or f"error {reply.error.code}")
    identity = _config(reply.content, IDENTITY)
    if said := protocol.difference(identity, "it has", "this server has"):
        raise RecordError(f"{said}; install the same version on both. It was not charged")
    client = identity.get("client")
    if not isinstance(client, int):
        raise RecordError("no client in the identity")
    return client


def save_state(content: RecordDict, state: State) -> None:
    """Keep ``state`` in a client's context."""
    content[STATE] = to_arrays(flatten(state))


def load_state(content: RecordDict) -> State | None:
    """The state from ``save_state``, or None."""
    record = arrays_in(content, STATE)
    return None if record is None else unflatten(to_params(record))


def save_history(content: RecordDict, history: History) -> None:
    """Keep a client's own count of its events in its context."""
    content[HISTORY] = ConfigRecord({"events": [json.dumps(event.to_dict()) for event in history]})


def load_history(content: RecordDict) -> History:
    """The history from ``save_history``; empty without one."""
    if config_in(content, HISTORY) is None:
        return ()
    return merge(PrivacyEvent.from_dict(json.loads(event)) for event in _config(content, HISTORY)["events"])


class Kept(NamedTuple):
    """What a client keeps between rounds, as objects: its state, and its own count of its events."""

    state: State
    history: History

    @classmethod
    def of(cls, content: RecordDict) -> Kept | None:
        """That of a context; None before the first round of a client, and for one that keeps more."""
        state = load_state(content)
        if state is None or content.keys() != {STATE, HISTORY}:
            return None
        return cls(state, load_history(content))

    def content(self) -> RecordDict:
        """As a context has it."""
        content = RecordDict()
        save_history(content, self.history)
        save_state(content, self.state)
        return content


def _config(content: RecordDict, key: str) -> dict[str, Any]:
    record = config_in(content, key)
    if record is None:
        raise RecordError(f"no {key!r} record")
    return dict(record)
