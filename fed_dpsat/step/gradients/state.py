"""What a module keeps beside its parameters: each pass begins with what was there before the sum.

Else something would go from one pass to the next, and so from an example to others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fed_dpsat.step.gradients.call import modules
from fed_dpsat.step.gradients.loss import ModelLoss

CONTAINERS = (list, dict, set, deque)
BY_TORCH = frozenset({"_parameters", "_modules"})
"""Containers that hold parameters and parts; a pass puts parameters in and takes them out."""


def modules_of(loss_fn: object) -> list[nn.Module]:
    """The modules that ``loss_fn`` calls: its own, and its criterion if that is one."""
    if not isinstance(loss_fn, ModelLoss):
        return [loss_fn] if isinstance(loss_fn, nn.Module) else []
    return [loss_fn.module, *([loss_fn.criterion] if isinstance(loss_fn.criterion, nn.Module) else [])]


@contextmanager
def as_it_was(loss_fn: object) -> Iterator[None]:
    """Attributes, the containers among them, and buffers are afterwards what they were before."""
    parts = [part for module in modules_of(loss_fn) for part in modules(module)]
    attributes = [(part.__dict__, dict(part.__dict__)) for part in parts]
    held = [(value, value.copy()) for own, _ in attributes for key, value in own.items() if _is_kept(key, value)]
    kept = [b for part in parts for b in part._buffers.values() if b is not None and not b.is_inference()]
    buffers = [(b, b._version, b.detach().clone()) for b in kept]
    try:
        yield
    finally:
        for own, before in attributes:
            if _moved(own, before):
                own.clear()
                own.update(before)
        for value, before in held:
            _refill(value, before)
        for buffer, version, number in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(number)


def _is_kept(key: str, value: Any) -> bool:
    return type(value) in CONTAINERS and key not in BY_TORCH


def _moved(own: dict[str, Any], before: dict[str, Any]) -> bool:
    return len(own) != len(before) or any(own.get(key) is not value for key, value in before.items())


def _refill(value: Any, before: Any) -> None:
    value.clear()
    if isinstance(value, dict | set):
        value.update(before)
    else:
        value.extend(before)
