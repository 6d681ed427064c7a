"""Names and tensors of a module: a tensor may stand under two names, and a name may lead to what another one made.

What chooses layers counts tensors. A tensor is called by its first name, as in ``module.named_parameters()``; of a
layer are all tensors that it uses, also those of which another layer was first. A parametrised weight is of its layer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fed_dpsat.errors import ModelError

PARAMETRIZED = re.compile(r"(^|\.)parametrizations\..*$")
"""What ``nn.utils.parametrizations`` puts between a layer and its weight."""


def named_tensors(module: nn.Module) -> dict[str, str]:
    """Every name of a parameter, in the order of definition, with the first name of its tensor.

    A layer that stands under two names is there once, under its first.
    """
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(p), name)
        for prefix, layer in module.named_modules()
        for name, p in _own(prefix, layer)
    }


def layer_of(name: str) -> str:
    """The layer that the parameter ``name`` is of; itself if it is of none."""
    return PARAMETRIZED.sub("", name) if PARAMETRIZED.search(name) else name.rpartition(".")[0]


def layers(module: nn.Module) -> dict[str, list[str]]:
    """Layers in the order of their definition, with the first names of their tensors."""
    found: dict[str, list[str]] = {}
    for name, first in named_tensors(module).items():
        names = found.setdefault(layer_of(name), [])
        names += [] if first in names else [first]
    return found


def last_layers(module: nn.Module, count: int) -> list[str]:
    """The first names of the tensors of the last ``count`` layers, in order.

    Raises ``ModelError`` if a layer under two names is among them under one only: which is the last is not known then.
    """
    found = layers(module)
    chosen = list(found)[-count:]
    tensors = {name for layer in chosen for name in found[layer]}
    first = {id(p): name for name, p in module.named_parameters()}
    again: dict[str, set[str]] = {}
    for prefix, layer in module.named_modules(remove_duplicate=False):
        for name, p in _own(prefix, layer):
            again.setdefault(layer_of(name), set()).add(first[id(p)])
    last: list[set[str]] = []
    for prefix in reversed(again):
        last += [again[prefix]] if again[prefix] not in last else []
        if again[prefix] - tensors and len(last) <= count:
            raise ModelError(
                f"{type(module).__name__} has a layer under two names, {prefix!r} the later one: its last layers "
                f"are not known ({', '.join(chosen)}?); register it once, or the head last"
            )
    return [name for name in first.values() if name in tensors]


def shared_head(module: nn.Module) -> tuple[str, str] | None:
    """Two names of a tensor that the last layer uses and another one too, the last layer's first; None without one."""
    found, last = named_tensors(module), list(layers(module))[-1]
    names = {first: name for name, first in found.items() if layer_of(name) == last}
    for name, first in found.items():
        if first in names and layer_of(name) != last:
            return names[first], name
    return None


def check_memory(module: nn.Module) -> None:
    """Raise ``ModelError`` for two parameters in the same memory, each trained for itself, or one without a shape."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{type(module).__name__} does not know the shape of {name} yet; call it once on an example before it "
                "is given"
            )
    spans = sorted((p.device.type, p.data_ptr(), p.data_ptr() + _extent(p), n) for n, p in module.named_parameters())
    for (kind, _, end, one), (other_kind, start, _, other) in itertools.pairwise(spans):
        if kind == other_kind and start and start < end:
            raise ModelError(
                f"{one} and {other} are two parameters in one memory, which would be trained apart; tie them as one "
                "(out.weight = inp.weight), or copy the data"
            )


def _own(prefix: str, layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((f"{prefix}.{key}" if prefix else key, p) for key, p in layer._parameters.items() if p is not None)


def _extent(p: Tensor) -> int:
    """Bytes from the first number to the last."""
    if not p.numel():
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))) * p.element_size()
