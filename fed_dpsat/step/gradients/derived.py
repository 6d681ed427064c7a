"""Weights that are functions of parameters alone: slices, transposes, standardised filters.

With w = f(p) and per-example gradients V of w, those of p are V times the Jacobian of f, the same for all
examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed_dpsat.params import Params
from fed_dpsat.step.gradients import standard
from fed_dpsat.step.gradients.contribution import Contribution, Rows, Unplanned, wide


def leaves_of(weight: Tensor, name: str) -> list[Tensor]:
    """The parameters that ``weight`` is a function of; ``Unplanned`` if it is one of data too."""
    leaves: dict[int, Tensor] = {}
    seen, todo = set(), [weight.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "PlannedBackward":
            raise Unplanned(f"{name} with weights that depend on the data")
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
        todo += [function for function, _ in node.next_functions]
    return list(leaves.values())


def spread(weights: list[tuple[Tensor, Contribution, str]], leaves: Params) -> dict[str, list[Contribution]]:
    """Contributions to the parameters from contributions to functions of them, ``(function, held, layer)``."""
    found: dict[str, list[Contribution]] = {}
    names = {id(leaf): name for name, leaf in leaves.items()}
    others: list[tuple[Tensor, Contribution]] = []
    for w, held, layer in weights:
        parents = sorted(leaves_of(w, layer), key=lambda leaf: -leaf.ndim)
        pair = None
        if len(parents) == 2 and all(id(leaf) in names for leaf in parents):
            pair = standard.contributions(w, held, *parents)
        if pair is None:
            others.append((w, held))
        else:
            for leaf, contribution in zip(parents, pair, strict=True):
                found.setdefault(names[id(leaf)], []).append(contribution)
    for w, held in others:
        gradients = torch.autograd.grad(
            w, list(leaves.values()), held.rows(), is_grads_batched=True, allow_unused=True, retain_graph=True
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                found.setdefault(name, []).append(Rows(data=wide(gradient)))
    return found
