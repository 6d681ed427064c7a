"""A module that stays as it is: one serves all clients and the server, and of its tensors only the trained are swapped.

A pass that writes a buffer, a frozen weight or a counter would take what it learned of one client's examples to the
next client and to whoever evaluates, without noise, and to other bits on other workers; none of it is sent or resumed.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_leaves, tree_map

from fed_dpsat.errors import ModelError
from fed_dpsat.step.examples import Examples
from fed_dpsat.step.generators import seed, training_on
from fed_dpsat.step.gradients.call import call, modules
from fed_dpsat.step.placement import device_of

OWN = vars(nn.Module()).keys()
"""What each module has, whatever it is."""
SHOWN = 3
REMEDY = (
    "all clients and the server share one module, so a value that a forward pass writes would be shared without noise: "
    "remove that state, or compute it anew in each pass"
)
FOR_SPECTRAL_NORM = "spectral_norm iterates on buffers from pass to pass: use nn.utils.parametrizations.weight_norm"

Attributes = dict[tuple[nn.Module, str], Any]
Kept = tuple[dict[str, Any], str, Tensor, Tensor]
"""Where a module keeps a tensor, under which name, the tensor, and a copy of it."""


def check_unchanging(module: nn.Module, inputs: Examples, others: Examples) -> None:
    """Raise ``ModelError``, by name, if passes over made-up ``inputs[B, ...]`` change ``module``; it is left as it was.

    In training and in evaluation mode ``inputs``, ``others`` and ``inputs`` again go through it, with all generators
    seeded alike.

    ======================================== =============================================
    a buffer or a parameter                  keeps its value
    a number, text or list of such           the second time and the third leave it alone
    a tensor or anything else that it keeps  may change, if outputs do not depend on it
    ======================================== =============================================

    What is made in the first pass, such as a table for that size, counts as it was after that. Raises what the module
    raises.
    """
    device, training = device_of(module), {part: part.training for part in modules(module)}
    kept, first = _kept(module), _attributes(module)
    values = {name: t.detach().clone() for name, t in _tensors(module).items()}
    try:
        with training_on(device), _generators():
            for mode in (True, False):
                module.train(mode)
                _check_mode(module, (inputs, others), values, "training" if mode else "evaluation")
    finally:
        for part, was in training.items():
            part.training = was
        _put_back(kept)
        now = _attributes(module)
        for (part, name), value in first.items():
            if repr(value) != repr(now.get((part, name))):
                setattr(part, name, value)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Raise ``ModelError``, by name, if ``module`` comes out with another buffer, or with a parameter written into.

    Also in place of another error, which it may have led to; buffers are put back. Examples may change what made-up
    ones do not.
    """
    buffers = _kept(module, parameters=False)
    versions = [(p, _version(p)) for part in modules(module) for p in part._parameters.values() if p is not None]
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        raised = error
    wrong = {id(t) for t in _put_back(buffers)} | {id(p) for p, version in versions if _version(p) != version}
    if wrong:
        names = [name for name, t in _tensors(module).items() if id(t) in wrong]
        raise _error(module, names, "while it trained") from raised
    if raised:
        raise raised


def _check_mode(module: nn.Module, batches: tuple[Examples, Examples], values: Mapping[str, Tensor], mode: str) -> None:
    inputs, others = batches

    def run(x: Examples) -> Any:
        seed(device_of(module), 0)
        with torch.no_grad():
            return call(module, {}, tree_map(torch.clone, x))

    where = f"in a pass in {mode} mode"
    once = run(inputs)
    made = {name: t.detach().clone() for name, t in _tensors(module).items()}
    attributes = _attributes(module)
    run(others)
    again = run(inputs)
    after, now = _tensors(module), _attributes(module)
    wanted = {**made, **values}
    if wrong := [name for name, value in wanted.items() if name not in after or not _same(after[name], value)]:
        raise _error(module, wrong, where)
    moved = [key for key in attributes.keys() | now.keys() if repr(attributes.get(key)) != repr(now.get(key))]
    if moved:
        prefixes = {part: prefix for prefix, part in module.named_modules()}
        raise _error(module, sorted(f"{prefixes[part]}.{name}".lstrip(".") for part, name in moved), where)
    pairs = zip(tree_leaves(once), tree_leaves(again), strict=False)
    if not all(_close(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)):
        raise ModelError(
            f"{type(module).__name__} gives other outputs for the same input once another was in between, in {mode} "
            f"mode: it keeps something from pass to pass; {REMEDY}"
        )


def _error(module: nn.Module, names: Iterable[str], where: str) -> ModelError:
    listed = list(names)
    shown = ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")
    spectral = any(name.endswith(("._u", "._v", "weight_u", "weight_v")) for name in listed)
    remedy = f"{REMEDY}. {FOR_SPECTRAL_NORM}" if spectral else REMEDY
    return ModelError(f"{type(module).__name__} changes {shown} {where}; {remedy}")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {**dict(parameters), **dict(buffers)}


def _attributes(module: nn.Module) -> Attributes:
    """Copies of the numbers, texts and containers of such that parts of ``module`` have beside torch's own."""
    return {
        (part, name): copy.deepcopy(value)
        for part in modules(module)
        for name, value in vars(part).items()
        if name not in OWN and _plain(value)
    }


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value)) and all(map(_plain, value.values()))
    return value is None or isinstance(value, int | float | str | bytes | complex)


def _kept(module: nn.Module, *, parameters: bool = True) -> list[Kept]:
    return [
        (places, name, tensor, tensor.detach().clone())
        for part in modules(module)
        for places in _places(part, parameters)
        for name, tensor in places.items()
        if tensor is not None
    ]


def _places(part: nn.Module, parameters: bool) -> list[dict[str, Any]]:
    return [part._parameters, part._buffers] if parameters else [part._buffers]


def _put_back(kept: Iterable[Kept]) -> list[Tensor]:
    """Each tensor to its place, with its value; those that were not there, or had another."""
    wrong = []
    with torch.no_grad():
        for places, name, tensor, value in kept:
            now = places.get(name)
            if now is None or is_functorch_wrapped_tensor(now) or not _same(now, value):
                wrong.append(tensor)
            places[name] = tensor
            if not _same(tensor, value):
                tensor.copy_(value)
    return wrong


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a is b or torch.equal(a, b) or (a.dtype.is_floating_point and torch.allclose(a, b, 0, 0, equal_nan=True))


def _close(a: Tensor, b: Tensor) -> bool:
    """To rounding: how a kernel adds up may depend on where its memory lies."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@contextmanager
def _generators() -> Iterator[None]:
    """Python's and numpy's generators are afterwards as they were; a layer may draw from them."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
