"""A module at parameters that are given, and its parts: what a step asks for each time, so both have to be quick.

``torch.func.functional_call`` does the same as ``call``; half a percent to two of a step goes into its bookkeeping.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.func import functional_call

from fed_dpsat.params import Params

Slot = tuple[dict[str, Any], str]
"""Where a module keeps one tensor."""


def modules(module: nn.Module) -> list[nn.Module]:
    """``module`` and all in it, each once, in the order of ``module.modules()``."""
    return [part for _, part in _named(module)]


def call(module: nn.Module, params: Params, inputs: Any) -> Any:
    """``module(inputs)`` with its parameters replaced by ``params``; those that share a tensor are replaced together.

    A tuple or a list is a module's arguments, a dictionary its keyword arguments. What is not a parameter of an
    ordinary module, or one under two names, is left to ``functional_call``.
    """
    slots = _slots(module)
    if not params.keys() <= slots.keys() or len({id(slots[name]) for name in params}) < len(params):
        return functional_call(module, params, *arguments(inputs))
    before = [(where, key, where[key]) for name in params for where, key in slots[name]]
    try:
        for name, tensor in params.items():
            for where, key in slots[name]:
                where[key] = tensor
        args, named = arguments(inputs)
        return module(*args, **named)
    finally:
        for where, key, tensor in before:
            where[key] = tensor


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``inputs`` as the arguments of a module, in order and by name."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _slots(module: nn.Module) -> dict[str, list[Slot]]:
    """By every name of a parameter, the places of its tensor."""
    places: dict[int, list[Slot]] = {}
    found = {}
    for prefix, part in _named(module):
        for key, tensor in part._parameters.items():
            if tensor is not None and isinstance(part._parameters, dict):  # TorchScript has something else
                places.setdefault(id(tensor), []).append((part._parameters, key))
                found[prefix + key] = places[id(tensor)]
    return found


def _named(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Prefixes of names, with the modules that they lead to first."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(prefix: str, part: nn.Module) -> None:
        if id(part) in seen:
            return
        seen.add(id(part))
        found.append((prefix, part))
        for name, child in part._modules.items():
            if child is not None:
                visit(f"{prefix}{name}.", child)

    visit("", module)
    return found
