"""A device's answers to Flower's messages: what they carry is looked at before it is used, and no error tells of data.

A node is a device where its own configuration names a ``policy``; Flower hands that over from the command that started
the SuperNode, never from the server.
"""

from __future__ import annotations

from collections.abc import Callable
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from fed_dpsat.device import client
from fed_dpsat.device.data import own_data
from fed_dpsat.device.journal import Refusal
from fed_dpsat.device.log import device_log, one_line
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.errors import RunError
from fed_dpsat.flower.wire import codec, records
from fed_dpsat.flower.wire.arrays import read_array
from fed_dpsat.params import Params
from fed_dpsat.run.process import tune_allocator
from fed_dpsat.step.subspace import Coordinates, Span

KNOWN = {records.ARRAYS, records.ASSIGNMENT, records.SUBSPACE, records.SAME, "config"}
"""Records that a question may hold. ``config`` is the strategy's; a device reads FedProx's ``proximal-mu`` in it. What
the server's own data are is not its business: it has others.

Of a subspace a device sends its numbers and nothing more: they are a function of the noised model that it would send.
"""


class DeviceError(RunError):
    """A device could not answer; why is in its own log, since the reason may tell of data."""


def identify(message: Message, context: Context) -> RecordDict:
    """Who the device is and how many examples it declares, for a run that its policy admits."""

    def ask(policy: Policy) -> RecordDict:
        size = client.num_examples(policy, context.run_id, context.run_config)
        return records.identity_content(policy.client, size)

    return _answered(context, "who it is", ask)


def train(message: Message, context: Context) -> RecordDict:
    """One private round, charged on the device before its reply is made."""

    def ask(policy: Policy) -> RecordDict:
        content = message.content
        if unknown := set(content) - KNOWN:
            raise Refusal(f"the message has a record {sorted(unknown)[0]!r}, which no device takes; leave it out")
        assignment = content.config_records.get(records.ASSIGNMENT)
        if assignment is None:
            raise Refusal(f"the message has no {records.ASSIGNMENT!r} record; say what is asked")
        config = policy.admit(context.run_id, context.run_config)
        within = _within(content)
        tune_allocator()
        done, result = client.answer(
            policy,
            context.run_id,
            context.run_config,
            dict(assignment),
            lambda like: _fitting(within, read_arrays(content.array_records.get(records.ARRAYS), like)),
            _proximal_mu(content),
        )
        counts = bool(context.run_config.get("release_counts")) and policy.release_counts
        size = len(own_data(policy, context.run_id).train)
        reply = records.reply_content(policy.client, done, result, size, release_counts=counts)
        start = read_arrays(content.array_records.get(records.ARRAYS), result.params)
        return codec.encode(reply, start, config.update_codec, config.update_share, within)

    return _answered(context, "a round", ask)


def _proximal_mu(content: RecordDict) -> float:
    try:
        return records.read_proximal_mu(content)
    except records.RecordError as error:
        raise Refusal(str(error)) from None


def _within(content: RecordDict) -> Coordinates | Span | None:
    try:
        return records.read_within(content)
    except records.RecordError as error:
        raise Refusal(str(error)) from None


def _fitting(within: Coordinates | Span | None, params: Params) -> Params:
    """``params``; raises ``Refusal`` where they have fewer coordinates than a subspace of them says are frozen."""
    d = sum(p.numel() for p in params.values())
    if isinstance(within, Coordinates) and within.frozen > d:
        raise Refusal(f"{records.SUBSPACE}: {within.frozen} frozen coordinates of a model with {d}")
    return params


def read_arrays(arrays: ArrayRecord | None, like: Params) -> Params:
    """The tensors of a message; raises ``Refusal`` unless names, shapes, types and bytes are just those of ``like``.

    Lengths are compared before anything is allocated, and nothing is unpickled.
    """
    if arrays is None:
        raise Refusal(f"the message has no {records.ARRAYS!r} record; send the model")
    if len(arrays) != len(like) or list(arrays) != list(like):
        raise Refusal(f"the message has {len(arrays)} arrays that are not the {len(like)} of the model in order")
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


def _answered(context: Context, what: str, ask: Callable[[Policy], RecordDict]) -> RecordDict:
    """The content of an answer, with a line in the log; raises ``Refusal`` or ``DeviceError``, which may leave."""
    try:
        policy = Policy.load(Path(str(context.node_config[records.POLICY])))
    except PolicyError as error:
        getLogger("fed_dpsat").error("%s", error)
        raise DeviceError("the device has no valid policy; its own log says why, and nothing was released") from None
    log = device_log(Path(policy.folder))
    asked = f"run {context.run_id}: {what}"
    try:
        content = ask(policy)
    except Refusal as refusal:
        said = one_line(str(refusal))
        log.log(WARNING, "%s: refused: %s", asked, said)
        raise Refusal(said) from None
    except Exception as error:  # its text may tell of data: it stays here
        log.error("%s: failed: %s", asked, one_line(f"{type(error).__name__}: {error}"), exc_info=True)
        raise DeviceError("the device could not answer; its own log says why, and nothing was released") from None
    log.log(INFO, "%s: answered%s", asked, _of(content))
    return content


def _of(content: RecordDict) -> str:
    if records.EVENT not in content.config_records:
        return ""
    event: Any = content.config_records[records.EVENT]
    return f": round {event['round']}, attempt {event['attempt']}, noise_multiplier {event['noise_multiplier']:g}"
