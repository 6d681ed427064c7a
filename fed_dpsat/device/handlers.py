"""Handlers of a device for Flower messages: they check all content before use, and no error contains data.

A node is a device if its node configuration names a ``policy``. Flower takes that configuration from the command that
started the SuperNode, never from the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from logging import ERROR, INFO, WARNING, getLogger
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from fed_dpsat.device import client
from fed_dpsat.device.data import size
from fed_dpsat.device.journal import Refusal
from fed_dpsat.device.log import device_log, one_line
from fed_dpsat.device.metrics import served
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.errors import RunError
from fed_dpsat.flower.wire import codec, records
from fed_dpsat.flower.wire.arrays import read_array
from fed_dpsat.params import Params
from fed_dpsat.run.logs import FIELDS
from fed_dpsat.run.process import tune_allocator
from fed_dpsat.step.subspace import Coordinates, Span

Value = TypeVar("Value")

NO_EVENT: Mapping[str, float] = {}
WORDS = {"identity": "identity", "round": "a round"}
KNOWN = {records.ARRAYS, records.ASSIGNMENT, records.SUBSPACE, records.SENDS, records.PROTOCOL, records.SAME, "config"}
"""Records that a message may hold, beside those that the client's half of a permitted strategy receives.

``config`` comes from the strategy; a device reads ``proximal-mu`` of FedProx in it. Of ``SAME`` a device compares what
the server declares of its data, and ignores the fingerprint. It sends what its own half declares, whatever ``SENDS``
says of that.

For a subspace a device sends only its coordinates, which are a function of the noised model.
"""


class DeviceError(RunError):
    """A device failed; the reason is in its own log, because the reason may contain data."""


def identify(message: Message, context: Context) -> RecordDict:
    """The number of the device and its declared number of examples, for a run that its policy admits."""

    def reply(policy: Policy) -> RecordDict:
        _check_protocol(message.content)
        held = client.num_examples(policy, context.run_id, context.run_config, _form(message.content))
        return records.identity_content(policy.client, held)

    return _logged(context, "identity", reply)


def train(message: Message, context: Context) -> RecordDict:
    """One private round; the device charges it before it computes the reply."""

    def reply(policy: Policy) -> RecordDict:
        content = message.content
        _check_protocol(content)
        config = policy.admit(context.run_id, context.run_config)
        receives = client.receives(policy, context.run_id, config)
        if unknown := set(content) - KNOWN - set(receives):
            raise Refusal(f"the message has a record {sorted(unknown)[0]!r}, which a device rejects; leave it out")
        assignment = content.config_records.get(records.ASSIGNMENT)
        if assignment is None:
            raise Refusal(f"the message has no {records.ASSIGNMENT!r} record; send one")
        received = {name: read_arrays(content.array_records.get(name), like, name) for name, like in receives.items()}
        within = _read(records.read_within, content)
        tune_allocator()
        done, result = client.train_round(
            policy,
            context.run_id,
            context.run_config,
            dict(assignment),
            lambda like, own: _fitting(within, own, read_arrays(content.array_records.get(records.ARRAYS), like)),
            _read(records.read_proximal_mu, content),
            _form(content),
            received,
        )
        counts = bool(context.run_config.get("release_counts")) and policy.release_counts
        held = size(policy, context.run_id, config.task)
        found = records.reply_content(policy.client, done, result, held, release_counts=counts)
        start = read_arrays(content.array_records.get(records.ARRAYS), result.params)
        return codec.encode(found, start, config.update_codec, config.update_share, within)

    return _logged(context, "round", reply)


def _check_protocol(content: RecordDict) -> None:
    _read(lambda sent: records.check_protocol(sent, "this device"), content)


def _read(reader: Callable[[RecordDict], Value], content: RecordDict) -> Value:
    try:
        return reader(content)
    except records.RecordError as error:
        raise Refusal(str(error)) from None


def _form(content: RecordDict) -> dict[str, object] | None:
    found = content.config_records.get(records.SAME)
    return None if found is None else dict(found)


def _fitting(within: Coordinates | Span | None, own: Coordinates | Span | None, params: Params) -> Params:
    """``params``; raises ``Refusal`` if ``within`` freezes more coordinates, or has more directions, than there are."""
    if isinstance(within, Span) and within != own:
        raise Refusal(f"{records.SUBSPACE}: {within}, and the round of this device has {own}; send that")
    d = sum(p.numel() for p in params.values())
    if isinstance(within, Coordinates) and within.frozen > d:
        raise Refusal(f"{records.SUBSPACE}: {within.frozen} frozen coordinates, above the {d} of the model; send fewer")
    return params


def read_arrays(arrays: ArrayRecord | None, like: Params, record: str = records.ARRAYS) -> Params:
    """The tensors of a message; raises ``Refusal`` unless names, shapes, types and lengths match ``like``.

    The check of the lengths comes before any allocation; nothing is unpickled.
    """
    if arrays is None:
        raise Refusal(f"the message has no {record!r} record; send it")
    if len(arrays) != len(like) or list(arrays) != list(like):
        raise Refusal(
            f"the names of the {len(arrays)} arrays are not the {len(like)} of the model in order; send those"
        )
    return {name: _read_array(name, arrays[name], like[name]) for name in like}


def _read_array(name: str, array: Array, like: torch.Tensor) -> torch.Tensor:
    expected = like.numpy()
    try:
        values = read_array(array, expected.shape, expected.dtype)
    except ValueError as error:
        raise Refusal(f"{name} {error}; send that") from None
    if not np.isfinite(values).all():
        raise Refusal(f"{name} has NaN or inf; send finite numbers")
    return torch.from_numpy(values.copy())


def _logged(context: Context, request: str, reply: Callable[[Policy], RecordDict]) -> RecordDict:
    """The content of a reply, with a line in the log; raises ``Refusal`` or ``DeviceError``, whose text may leave."""
    try:
        policy = Policy.load(Path(str(context.node_config[records.POLICY])))
    except PolicyError as error:
        getLogger("fed_dpsat").error("%s", error)
        raise DeviceError("the device has no valid policy; its own log has the reason, nothing was released") from None
    log = device_log(Path(policy.folder), policy.log_format)
    asked = f"run {context.run_id}: {WORDS[request]}"

    def note(level: int, outcome: str, text: str, event: Mapping[str, float] = NO_EVENT, failed: bool = False) -> None:
        fields = {"run": str(context.run_id), "request": request, "outcome": outcome, "may_hold_data": failed, **event}
        log.log(level, "%s: %s%s", asked, outcome, text, exc_info=failed, extra={FIELDS: fields})
        if metrics := served():
            metrics.count(request, outcome)

    try:
        content = reply(policy)
    except Refusal as refusal:
        said = one_line(str(refusal))
        note(WARNING, "refused", f": {said}")
        raise Refusal(said) from None
    except Exception as error:  # its text may contain data, so it stays in the log
        note(ERROR, "failed", f": {one_line(f'{type(error).__name__}: {error}')}", failed=True)
        raise DeviceError("the device failed; its own log has the reason, and nothing was released") from None
    event = _event(content)
    cost = ", ".join(f"{name} {value if type(value) is int else f'{value:g}'}" for name, value in event.items())
    note(INFO, "answered", f": {cost}" if cost else "", event)
    return content


def _event(content: RecordDict) -> dict[str, float]:
    """What a release cost, as its log has it; empty without one."""
    if records.EVENT not in content.config_records:
        return {}
    event: Any = content.config_records[records.EVENT]
    return {name: event[name] for name in ("round", "attempt", "noise_multiplier")}
