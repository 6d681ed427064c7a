"""One request of a server on a device: check it, charge it, train on the data of the device, store the reply."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.form import difference, form_of
from fed_dpsat.client.half import Records, received_by
from fed_dpsat.client.half_round import steps_of_model
from fed_dpsat.client.trial import try_client
from fed_dpsat.device.data import own_data
from fed_dpsat.device.journal import Refusal, Request
from fed_dpsat.device.policy import Policy
from fed_dpsat.device.release import release
from fed_dpsat.errors import DataError, InputError, SettingError
from fed_dpsat.params import Params, flatten, unflatten
from fed_dpsat.settings.config import MACHINE, RunConfig
from fed_dpsat.step.loop import LocalResult
from fed_dpsat.step.subspace import Coordinates, Span
from fed_dpsat.step.threads import intra_op_threads

RECORDS = "records"
"""In a stored reply, what the client's half sends beside the model."""
NO_RECORDS: Records = {}

ReadParams = Callable[[Params, Coordinates | Span | None], Params]
"""Reads the parameters of a message; raises ``Refusal`` unless they match those of the device, and its subspace."""


def num_examples(
    policy: Policy, run: int, settings: Mapping[str, Any], form: Mapping[str, object] | None = None
) -> int:
    """The declared number of examples, or persons, for a run that the policy admits and that passes a trial here.

    ``form`` is what the server declares of its data, if it says so; raises ``Refusal`` if the device declares another.
    """
    config = policy.admit(run, settings)
    check_form(policy, config, run, form)
    return _experiment(policy, config, run).sizes[0]


def check_form(policy: Policy, config: RunConfig, run: int, form: Mapping[str, object] | None) -> None:
    """Raise ``Refusal`` if ``form`` is not what the device declares of its own data."""
    if form is None:
        return
    own = _experiment(policy, config, run).dataset if config.features else own_data(policy, run, config.task)
    if said := difference(form, form_of(own)):
        raise Refusal(said)


def train_round(
    policy: Policy,
    run: int,
    settings: Mapping[str, Any],
    record: Mapping[str, Any],
    read_params: ReadParams,
    proximal_mu: float = 0.0,
    form: Mapping[str, object] | None = None,
    received: Records = NO_RECORDS,
) -> tuple[Assignment, LocalResult]:
    """The assignment in ``record`` and its result; parameters, records and the event may leave the device.

    ``form`` is that of ``num_examples``, ``received`` the records of ``receives``.

    Raises ``Refusal``, whose text may leave the device. The text of another error may contain data and must not leave.
    """
    config = policy.admit(run, settings)
    assignment = policy.admit_assignment(record, config)
    check_form(policy, config, run, form)
    experiment = _experiment(policy, config, run)
    _check_steps(experiment, assignment)
    params = read_params(experiment.shared(assignment.round), experiment.subspace(assignment.round))
    request = Request(
        run=str(run),
        round=assignment.round,
        attempt=assignment.attempt,
        settings=_digest({name: value for name, value in settings.items() if name not in MACHINE}),
        digest=_digest(settings, record, params, {"proximal_mu": proximal_mu}, *received.values()),
    )

    def compute(state: bytes | None) -> tuple[bytes, bytes]:
        kept = None if state is None else unflatten(unpack(state))
        with intra_op_threads(policy.threads):
            result = experiment.client_round(0, assignment, params, kept, proximal_mu, received)
        counted = torch.tensor(result.nonfinite_examples)
        reply = {f"params/{name}": value for name, value in result.params.items()} | {"nonfinite": counted}
        reply |= flatten({RECORDS: dict(result.records)}) if result.records else {}
        return pack(reply), pack(flatten(result.state))

    reply = unpack(
        release(
            Path(policy.folder),
            request,
            assignment.event,
            epsilon=policy.largest_epsilon,
            delta=policy.largest_delta,
            compute=compute,
        )
    )
    nonfinite = int(reply.pop("nonfinite"))
    added = unflatten({name: reply.pop(name) for name in list(reply) if name.startswith(f"{RECORDS}/")})
    return assignment, LocalResult(
        params={name.partition("/")[2]: value for name, value in reply.items()},
        state={},
        event=assignment.event,
        nonfinite_examples=nonfinite,
        records=added.get(RECORDS, {}),
    )


def receives(policy: Policy, run: int, config: RunConfig) -> Records:
    """What the client's half of an admitted run receives beside the model; empty without one."""
    if not config.local_models:
        return {}
    experiment = _experiment(policy, config, run)
    return received_by(experiment.half, experiment.shared(1))


@lru_cache(maxsize=1)
def _experiment(policy: Policy, config: RunConfig, run: int = 0) -> Experiment:
    """The experiment of the run after a trial on made-up examples; it loads only names on the lists of the policy."""
    data = own_data(policy, run, config.task)
    try:
        experiment = Experiment.build(config, dataset=data)
        _check_size(policy, experiment)
        try_client(experiment)
    except DataError:  # it may tell of an example, so it stays in the log
        raise
    except InputError as error:
        raise Refusal(str(error).replace(policy.start_from or "\0", "of the device")) from None
    return experiment


def _check_steps(experiment: Experiment, assignment: Assignment) -> None:
    try:
        if experiment.half is not None:
            steps_of_model(experiment.half, assignment.local_steps)
    except SettingError as error:
        raise Refusal(str(error)) from None


def _check_size(policy: Policy, experiment: Experiment) -> None:
    count = sum(p.numel() for p in experiment.trained(experiment.config.num_rounds).values())
    if count > policy.largest_parameters:
        raise Refusal(
            f"model={experiment.config.model!r} has {count} parameters, above largest_parameters="
            f"{policy.largest_parameters} of this device; choose a smaller model"
        )


def pack(tensors: Params) -> bytes:
    """Tensors as bytes, without pickle."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value.detach().cpu().numpy() for name, value in tensors.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(packed: bytes) -> Params:
    """The tensors that ``pack`` received."""
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _digest(*parts: Mapping[str, Any] | None) -> bytes:
    """SHA-256 of scalars as JSON and of tensors as names, types, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"|")
        for name, value in sorted((part or {}).items()):
            if isinstance(value, torch.Tensor):
                array = np.ascontiguousarray(value.numpy())
                digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
                digest.update(array.data if array.size else b"")
            else:
                digest.update(json.dumps([name, value.hex() if isinstance(value, float) else value]).encode())
    return digest.digest()
