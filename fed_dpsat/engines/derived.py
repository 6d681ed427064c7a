"""Weights that are functions of parameters alone: slices, transposes, standardised filters.

With w = f(p) and per-example gradients V of w, those of p are V times the Jacobian of f, the same for all
examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed_dpsat.engines.contribution import Contribution, Rows, Unplanned
from fed_dpsat.params import Params


def leaves_of(weight: Tensor, name: str) -> list[int]:
    """Ids of the parameters that ``weight`` is a function of; ``Unplanned`` if it is one of data too."""
    leaves, seen, todo = [], set(), [weight.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "_PlannedBackward":
            raise Unplanned(f"{name} with weights that depend on the data")
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(id(leaf))
        todo += [function for function, _ in node.next_functions]
    return leaves


def spread(weights: list[tuple[Tensor, Contribution]], leaves: Params) -> dict[str, list[Contribution]]:
    """Contributions to the parameters from contributions to functions of them."""
    if not weights:
        return {}
    outputs, rows = [w for w, _ in weights], [c.rows() for _, c in weights]
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), rows, is_grads_batched=True, allow_unused=True, retain_graph=True
    )
    return {name: [Rows(data=g)] for name, g in zip(leaves, gradients, strict=True) if g is not None}
