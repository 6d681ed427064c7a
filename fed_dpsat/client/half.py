"""The client's half of a strategy: what it may see, what it may change, and what it declares.

A strategy with an attribute ``client_half`` brings one. It is code that runs between the private steps of a client, so
it sees what these steps release and never an example, a raw gradient, or a generator of noise:

==================== =================================================================================
it is given          what that is made of
==================== =================================================================================
``Received``         the global model and the records of the strategy: released by earlier rounds
a private gradient   a clipped and noised sum, one event of the client's assignment
parameters, state    earlier private gradients, through this half and the optimizer
==================== =================================================================================

So all that it computes is post-processing of releases that are charged already. The argument is that of a
``PrivateOptimizer``, and so are its limits: a half that keeps something in a global variable, or looks for examples in
the memory of the process, is outside of it. Each call runs on a copy of the half, so attributes keep nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fed_dpsat import plugins
from fed_dpsat.client.known_noise import KnownNoise
from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, zeros_like
from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.optimizers.base import State

HALF = "half"
"""The key of what a half keeps, in a client's state."""

RESERVED = ("arrays", "metrics", "config", "fed_dpsat.")
"""Names of the records of all messages, and how the others begin."""

Records = Mapping[str, Params]
"""Named tensors by the name of their record."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """The message of a round: the global ``params``, and the ``records`` that the half ``receives``."""

    params: Params
    records: Records = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model after its ``local_steps``, and the mean of its private gradients, before any correction."""

    params: Params
    mean_gradient: Params


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of a client's round.

    ``params`` are sent as the client's model, with the names, shapes and types of the global one. ``records`` are sent
    beside them, as the half ``sends`` them. ``state``, a tree of named tensors, stays for the client's next round.
    """

    params: Params
    records: Records = field(default_factory=dict)
    state: State = field(default_factory=dict)


class ClientHalf:
    """A client that trains the global model and sends it; a half overrides what it does otherwise.

    ``models`` counts the models that a client trains in a round, each with ``local_steps`` private steps on the same
    data. All these steps are one event, which is planned, charged and run. No method draws random numbers, or writes
    into a tensor that it is given.
    """

    models: int = 1

    def sends(self, params: Params) -> Records:
        """What a reply has beside the model: by record, tensors of its names, shapes and types (values are not read).

        ``params`` are the parameters of the global model.
        """
        return {}

    def receives(self, params: Params) -> Records:
        """What a message of the strategy has beside the model, as in ``sends``."""
        return {}

    def start(self, received: Received, state: State) -> Sequence[Params]:
        """The parameters from which each of the ``models`` starts; ``state`` is empty in a client's first round."""
        return [received.params] * self.models

    def correct(self, model: int, private_gradient: Params, params: Params, received: Received, state: State) -> Params:
        """The gradient that the optimizer steps with, in place of the ``private_gradient`` of ``model`` (from 0).

        ``params`` are the parameters of that model before the step. The noise is in the gradient already, so a term
        that is added here changes no clipping and costs nothing.
        """
        return private_gradient

    def finish(self, received: Received, trained: Sequence[Trained], state: State) -> Finished:
        """What is sent and kept, from the ``models`` in their order."""
        return Finished(params=trained[0].params)

    def own_model(self, params: Params, state: State) -> Params:
        """The model that a client uses, of the global ``params`` and its ``state``; by default the global one."""
        return params


def half_of(strategy: object) -> ClientHalf | None:
    """The half that ``strategy`` brings, or None. Raises ``PluginError`` for another object than a half."""
    half = getattr(strategy, "client_half", None)
    if half is None:
        return None
    if not isinstance(half, ClientHalf) or not isinstance(half.models, int) or half.models < 1:
        name = type(strategy).__name__
        raise PluginError(
            f"client_half of {name} is {half!r}; make it a fed_dpsat.client.half.ClientHalf with models of at least 1"
        )
    return half


def named_strategy(config: RunConfig) -> Any:
    """The object that ``config.strategy`` names, for a server or for its half."""
    settings = {**config.settings(), "known_noise": KnownNoise.of(config)}
    return plugins.build("strategy", config.strategy, settings, config.strategy_args)


def with_half(config: RunConfig, strategy: object = None) -> RunConfig:
    """``config`` with the ``local_models`` of ``strategy``, by default of the one that it names.

    For a process that has both halves: a client on a network loads a strategy only if ``local_models`` says so.
    """
    half = half_of(named_strategy(config) if strategy is None else strategy)
    if half is None or config.local_models:
        return config
    return dataclasses.replace(config, local_models=half.models)


def check_models(config: RunConfig, half: ClientHalf | None) -> None:
    """Raise ``SettingError`` unless ``local_models`` is what the strategy says: it decides what a round costs."""
    models = half.models if half else 0
    if config.local_models != models:
        what = f"{models}, the models that strategy={config.strategy!r} trains on a client"
        raise SettingError("local_models", config.local_models, what, f"set local_models={models}")


def sent_by(half: ClientHalf | None, params: Params) -> Records:
    """What ``half`` sends; raises ``PluginError`` for a name that is no string, or of all messages."""
    return _named(copy.deepcopy(half).sends(params), "sends") if half else {}


def received_by(half: ClientHalf | None, params: Params) -> Records:
    """What ``half`` receives; raises ``PluginError`` as ``sent_by``."""
    return _named(copy.deepcopy(half).receives(params), "receives") if half else {}


def _named(records: Records, what: str) -> Records:
    if strange := [name for name in records if not isinstance(name, str)]:
        raise PluginError(f"the client's half {what} a record {strange[0]!r}; name it with a string")
    if wrong := [name for name in records if name.startswith(RESERVED)]:
        raise PluginError(f"the client's half {what} a record {wrong[0]!r}, a name of all messages; rename it")
    return records


def blank(records: Records) -> Records:
    """Zeros of the shapes and types of ``records``."""
    return {name: zeros_like(tensors) for name, tensors in records.items()}


def check_finished(half: ClientHalf, params: Params, finished: Finished) -> Finished:
    """``finished`` in the order of ``params`` and of what the half declares.

    Raises ``PluginError`` unless the model is like the global ``params``, the records are those that the half
    ``sends``, and the state is a tree of tensors.
    """
    name, wanted = type(half).__name__, sent_by(half, params)
    if finished.records.keys() != wanted.keys():
        raise PluginError(
            f"{name}.finish sends the records {sorted(finished.records)}, and sends() declares {sorted(wanted)}; "
            "declare each, so that the server and its judge know it before the first round"
        )
    parts = {
        "params": (finished.params, params),
        **{key: (finished.records[key], like) for key, like in wanted.items()},
    }
    for part, (found, like) in parts.items():
        if _forms(found) != _forms(like):
            raise PluginError(f"{name}.finish: {part} are {_forms(found)}, not {_forms(like)}; send those")
    _check_tree(finished.state, name)
    return Finished(
        params={key: finished.params[key] for key in params},
        records={key: {k: finished.records[key][k] for k in like} for key, like in wanted.items()},
        state=finished.state,
    )


def _forms(params: Params) -> dict[str, str]:
    return {name: f"{str(p.dtype).removeprefix('torch.')}{list(p.shape)}" for name, p in sorted(params.items())}


def _check_tree(tree: State, name: str) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _check_tree(value, name)
        elif not isinstance(value, Tensor):
            raise PluginError(
                f"{name}.finish keeps {key!r}, a {type(value).__name__}; keep tensors, and dictionaries of them"
            )
