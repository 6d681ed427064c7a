"""Named tensors and the few vector operations that the numerics need."""

from __future__ import annotations

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
