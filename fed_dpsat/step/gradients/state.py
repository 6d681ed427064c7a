"""What a module keeps beside its parameters: each pass begins with what was there before the sum.

Else something would go from one pass to the next, and so from an example to others. A module that keeps numbers, texts,
tensors and flat containers of those has them put back; one that keeps anything else is copied for each pass.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fed_dpsat.errors import ModelError
from fed_dpsat.step.gradients.call import modules
from fed_dpsat.step.gradients.loss import ModelLoss

Loss = TypeVar("Loss")

CONTAINERS = (list, dict, set, deque, OrderedDict)
OF_TORCH = frozenset(vars(nn.Module()))
"""Containers of torch's own, of parts, parameters, buffers and hooks."""

NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, types.ModuleType)
PLAIN = frozenset((*NUMBERS, *CODE, weakref.ref))


def modules_of(loss_fn: object) -> list[nn.Module]:
    """The modules that ``loss_fn`` calls: its own, and its criterion if that is one."""
    if not isinstance(loss_fn, ModelLoss):
        return [loss_fn] if isinstance(loss_fn, nn.Module) else []
    return [loss_fn.module, *([loss_fn.criterion] if isinstance(loss_fn.criterion, nn.Module) else [])]


@contextmanager
def afresh(loss_fn: Loss) -> Iterator[Loss]:
    """``loss_fn`` for one pass, after which its modules are as they were; or a copy of it with the same parameters."""
    parts = [part for module in modules_of(loss_fn) for part in modules(module)]
    if not all(map(_is_simple, parts)):
        yield copied(loss_fn)
        return
    attributes = [(part.__dict__, dict(part.__dict__)) for part in parts]
    held = [(value, value.copy()) for own, _ in attributes for value in own.values() if type(value) in CONTAINERS]
    kept = [b for part in parts for b in part._buffers.values() if b is not None and not b.is_inference()]
    buffers = [(b, b._version, b.detach().clone()) for b in kept]
    try:
        yield loss_fn
    finally:
        for own, before in attributes:
            if len(own) != len(before) or any(own.get(key) is not value for key, value in before.items()):
                own.clear()
                own.update(before)
        for value, before in held:
            if len(value) or len(before):
                _refill(value, before)
        for buffer, version, number in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(number)


def copied(loss_fn: Loss) -> Loss:
    """``loss_fn`` with copies of its modules that have the same parameters.

    Raises ``ModelError`` for a module that cannot be copied.
    """
    originals = modules_of(loss_fn)
    shared: dict[int, Any] = {id(p): p for module in originals for p in module.parameters()}
    try:
        copies: list[Any] = [copy.deepcopy(module, shared) for module in originals]
    except Exception as error:  # whatever a part of it says
        names = ", ".join(type(module).__name__ for module in originals)
        raise ModelError(
            f"{names} keeps what no pass may change, so each pass has a copy of it, and it cannot be copied: {error}"
        ) from error
    if isinstance(loss_fn, ModelLoss):
        module, criterion = [*copies, loss_fn.criterion][:2]
        return replace(loss_fn, module=module, criterion=criterion)
    return copies[0] if copies else loss_fn


def _is_simple(part: nn.Module) -> bool:
    """Whether all that ``part`` keeps is put back by a shallow copy."""
    return all(key in OF_TORCH or _is_flat(value) for key, value in part.__dict__.items())


def _is_flat(value: Any) -> bool:
    if _is_plain(value):
        return True
    if type(value) in (dict, OrderedDict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return type(value) in (list, set, deque, frozenset) and all(map(_is_plain, value))


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in PLAIN or kind in (Tensor, nn.Parameter) or (kind is tuple and all(map(_is_plain, value)))


def _refill(value: Any, before: Any) -> None:
    value.clear()
    if isinstance(value, dict | set):
        value.update(before)
    else:
        value.extend(before)
