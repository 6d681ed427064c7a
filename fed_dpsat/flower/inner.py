"""The inner strategy: the settings of a stock strategy that a run overrules or refuses, and its state.

============================================== ====================================================================
setting or class                               in a run
============================================== ====================================================================
``fraction_train``, ``min_train_nodes``,       overruled: ``clients_per_round``, ``client_sampling`` and
``min_available_nodes``                        ``min_clients`` select the clients, each of which pays
``fraction_evaluate``, ``min_evaluate_nodes``, overruled: no client is asked to evaluate
``evaluate_metrics_aggr_fn``
``DifferentialPrivacyClientSide...``           refused: no client clips for it, so its noise covers nothing
``DifferentialPrivacyServerSide...``           refused: its noise is numpy's global one, and no ledger charges it
``aggregate_fit``, ``configure_fit``           refused beside Flower's own ``aggregate_train``, ``configure_train``:
                                               nothing calls these methods of its old interface
============================================== ====================================================================

A strategy with ``state_dict()`` and ``load_state_dict(state)`` gives its own state, as data whose reading runs no code.
The state of any other strategy is its attributes: numbers, text, arrays, tensors, Flower's records, numpy generators,
strategies, and containers of these. Attributes that cannot change after construction (functions, types, loggers, the
client's half) are left out.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import flwr.app
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)

from fed_dpsat.client.half import ClientHalf
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.flower.wire import compat
from fed_dpsat.settings.config import RunConfig

log = logging.getLogger("fed_dpsat")

CLIENT_SIDE = (DifferentialPrivacyClientSideFixedClipping, DifferentialPrivacyClientSideAdaptiveClipping)
SERVER_SIDE = (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyServerSideAdaptiveClipping)
OLD = {"aggregate_fit": "aggregate_train", "configure_fit": "configure_train"}
"""Methods of Flower's old interface of strategies, and those in their place."""
DECIDED = {
    "fraction_train": 1.0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
    "fraction_evaluate": 0.0,
    "min_evaluate_nodes": 0,
}
"""Attributes of ``FedAvg`` and its subclasses, with their values in every run."""

Plain = Any
"""Data that ``torch.load(weights_only=True)`` reads: scalars, text, tensors, and lists and dicts of these."""

UNCHANGING = (
    *(FunctionType, MethodType, BuiltinFunctionType, partial, np.ufunc, type, ModuleType, Enum),
    *(logging.Logger, logging.LoggerAdapter, ClientHalf),
)
CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
RECORDS: dict[str, Any] = {"arrays": ArrayRecord, "metrics": MetricRecord, "config": ConfigRecord}


class StrategyStateError(RunError):
    """A strategy holds an object that a checkpoint cannot hold."""


def check_inner(strategy: Strategy) -> None:
    """Raise ``SettingError`` for a privacy wrapper of Flower or a method that nothing calls, also in a nested one."""
    for one in _nested(strategy):
        _check_called(one)
        if isinstance(one, CLIENT_SIDE + SERVER_SIDE):
            why = (
                "one whose noise protects anything here, because no client clips its change for it"
                if isinstance(one, CLIENT_SIDE)
                else "one whose noise a ledger counts: it comes from numpy's global generator, and the bound is on all "
                "arrays of a reply, counters included"
            )
            inner = type(one.strategy).__name__
            raise SettingError(
                "strategy", type(one).__name__, why, f"give {inner} itself, and privacy_unit=client for such a bound"
            )


def _check_called(strategy: Strategy) -> None:
    """Raise ``SettingError`` for a method of Flower's old interface without the one that stands in its place."""
    for old, new in OLD.items():
        if hasattr(strategy, old) and getattr(type(strategy), new).__module__.startswith("flwr."):
            name = type(strategy).__name__
            remedy = f"rename it to {new}, which takes and returns other types: see docs/coming_from.md"
            raise SettingError("strategy", name, f"one without {old}, which nothing calls", remedy)


def take_over(strategy: Strategy) -> None:
    """Let stock strategies take all nodes that they are shown: the roster draws the cohort, not they."""
    for one in _nested(strategy):
        if isinstance(one, FedAvg):
            vars(one).update(DECIDED)


def say_overruled(strategy: Strategy, config: RunConfig) -> None:
    """Log in one line the settings of ``strategy`` that ``config`` overrules; call it before ``take_over``."""
    usual = vars(FedAvg())
    ours = {"fraction_train": config.client_rate, "min_available_nodes": config.min_clients}
    overruled = [
        f"{name}={vars(one)[name]!r}"
        for one in _nested(strategy)
        if isinstance(one, FedAvg)
        for name, decided in {**DECIDED, "evaluate_metrics_aggr_fn": None}.items()
        if vars(one).get(name, decided) not in (usual[name], decided, ours.get(name))
    ]
    if overruled:
        log.warning(
            "strategy: %s of %s has no effect: clients_per_round=%d, client_sampling=%s and min_clients=%d say who is "
            "asked (of %d clients, %g a round), and no client is asked to evaluate",
            ", ".join(overruled),
            type(strategy).__name__,
            config.clients_per_round,
            config.client_sampling,
            config.min_clients,
            config.num_clients,
            config.cohort_size,
        )


def _nested(strategy: Strategy) -> Iterator[Strategy]:
    """``strategy`` and the strategies inside it."""
    found, waiting = set[int](), [strategy]
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found.add(id(one))
            yield one
            waiting += [value for value in getattr(one, "__dict__", {}).values() if isinstance(value, Strategy)]


def capture_state(strategy: Strategy) -> dict[str, Plain]:
    """The state of ``strategy``. Raises ``StrategyStateError`` with the name of a value that cannot be kept."""
    if hasattr(strategy, "state_dict"):
        return {"own": _encode(strategy.state_dict(), f"{type(strategy).__name__}.state_dict()")}
    name = type(strategy).__name__
    values = {key: value for key, value in vars(strategy).items() if not isinstance(value, UNCHANGING)}
    return {"attributes": {key: _encode(value, f"{name}.{key}") for key, value in values.items()}}


def restore_state(strategy: Strategy, state: Mapping[str, Plain]) -> None:
    """Put a state of ``capture_state`` into a strategy that was built in the same way."""
    if "own" in state:
        strategy.load_state_dict(_decode(state["own"], None))  # type: ignore[attr-defined]
        return
    for key, value in state["attributes"].items():
        setattr(strategy, key, _decode(value, getattr(strategy, key, None)))


def _encode(value: Any, where: str) -> Plain:
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.Tensor):
        return value
    if isinstance(value, np.generic | np.ndarray):
        array = np.asarray(value)
        return {"kind": "scalar" if isinstance(value, np.generic) else "array", "of": torch.from_numpy(array.copy())}
    if isinstance(value, flwr.app.Array):
        return {"kind": "flower", "of": torch.from_numpy(compat.view(value).copy())}
    for kind, record in RECORDS.items():
        if isinstance(value, record):
            return {"kind": kind, "of": {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}}
    if isinstance(value, Mapping):
        items = [[_encode(k, where), _encode(v, f"{where}[{k!r}]")] for k, v in value.items()]
        return {"kind": "dict", "of": items}
    for kind, container in CONTAINERS.items():
        if type(value) is container:
            return {"kind": kind, "of": [_encode(item, f"{where}[...]") for item in value]}
    if isinstance(value, np.random.Generator):
        return {"kind": "generator", "of": _encode(value.bit_generator.state, where)}
    if isinstance(value, Strategy):
        return {"kind": "strategy", "of": capture_state(value)}
    raise StrategyStateError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold; give the strategy state_dict() and "
        "load_state_dict(state) of numbers, text and arrays"
    )


def _decode(value: Plain, built: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind, of = value["kind"], value["of"]
    if kind in ("scalar", "array"):
        return of.numpy()[()] if kind == "scalar" else of.numpy()
    if kind == "flower":
        return compat.Array(of.numpy())
    if kind in RECORDS:
        return RECORDS[kind]({key: _decode(item, None) for key, item in of.items()})
    if kind == "dict":
        return {_decode(k, None): _decode(v, None) for k, v in of}
    if kind in CONTAINERS:
        return CONTAINERS[kind](_decode(item, None) for item in of)
    if kind == "generator":
        state = _decode(of, None)
        generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
        generator.bit_generator.state = state
        return generator
    restore_state(built, of)
    return built
