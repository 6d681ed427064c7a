"""Named tensors and the few vector operations that the numerics need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]


def trainable(module: nn.Module) -> Params:
    """Detached copies of the parameters of ``module`` that require a gradient, in definition order."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def zeros_like(params: Params) -> Params:
    """Zeros with the shapes, types and devices of ``params``."""
    return {name: torch.zeros_like(p) for name, p in params.items()}


def subtract(a: Params, b: Params) -> Params:
    """``a - b``, name by name."""
    return {name: p - b[name] for name, p in a.items()}


def global_norm(params: Params) -> Tensor:
    """Euclidean norm over all tensors together, a scalar; 0 for no tensors."""
    return torch.nn.utils.get_total_norm(list(params.values()), foreach=False)  # vmap has no rule for foreach


def laid_end_to_end(params: Params) -> Tensor:
    """All coordinates, ``[d]``."""
    return torch.cat([p.flatten() for p in params.values()])


def cut(flat: Tensor, like: Params) -> Params:
    """``flat[d]`` as tensors of the names and shapes of ``like``."""
    pieces = torch.split(flat, [p.numel() for p in like.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(like.items(), pieces, strict=True)}


# Trees of named tensors, such as the state of an optimizer.


def map_tree(function: Callable[..., Any], tree: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Apply ``function`` to each tensor of ``tree`` together with the tensors at the same path of ``others``."""
    return {
        name: map_tree(function, value, *(other[name] for other in others))
        if isinstance(value, dict)
        else function(value, *(other[name] for other in others))
        for name, value in tree.items()
    }


def flatten(tree: dict[str, Any]) -> Params:
    """``tree`` with one level of names, ``slot/name``, for a file or a message; the inverse of ``unflatten``.

    A slash inside a name becomes ``~1`` and a tilde ``~0`` (RFC 6901). An empty tree becomes an empty tensor whose
    name ends in a slash.
    """
    return dict(_leaves(tree, ""))


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    if not tree and prefix:
        yield prefix, torch.empty(0)
    for name, value in tree.items():
        path = prefix + name.replace("~", "~0").replace("/", "~1")
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}/")
        else:
            yield path, value


def unflatten(flat: Params) -> dict[str, Any]:
    """The tree that ``flatten`` received."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *slots, name = (part.replace("~1", "/").replace("~0", "~") for part in path.split("/"))
        inner = tree
        for slot in slots:
            inner = inner.setdefault(slot, {})
        if name:
            inner[name] = value
    return tree
