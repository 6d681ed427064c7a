"""Weights that are functions of parameters alone: slices, transposes, standardised filters.

With w = f(p) and per-example gradients V of w, those of p are V times the Jacobian of f, the same for all examples. A
slice, a transpose or another selection of numbers keeps norms, so V need not be rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fed_dpsat.params import Params
from fed_dpsat.step.gradients import standard
from fed_dpsat.step.gradients.contribution import Contribution, Rows, wide

ACCUMULATES = type(torch.zeros((), requires_grad=True).view_as(torch.zeros(())).grad_fn.next_functions[0][0])  # type: ignore[union-attr]
"""The class of nodes that stand for a leaf; a function of a module's own may have any name and attributes."""

COPIES = frozenset(
    f"{name}Backward{number}"
    for name in (
        *(
            "Alias",
            "Clone",
            "Expand",
            "Permute",
            "ReshapeAlias",
            "Select",
            "Slice",
            "Split",
            "SplitWithSizes",
            "Squeeze",
        ),
        *("T", "Transpose", "Unbind", "Unsafe", "UnsafeView", "Unsqueeze", "View"),
    )
    for number in (0, 1, 2)
)
"""Operations each of whose results is one of the numbers that it was given."""


def leaves_of(function: Tensor) -> list[Tensor]:
    """The parameters that ``function`` is one of."""
    return list({id(node.variable): node.variable for node in _nodes(function) if _is_leaf(node)}.values())


def spread(functions: list[tuple[Tensor, Contribution]], leaves: Params) -> dict[str, list[Contribution]]:
    """Contributions to the parameters from contributions to functions of them."""
    found: dict[str, list[Contribution]] = {}
    names = {id(leaf): name for name, leaf in leaves.items()}
    for name, selections in _selections(functions, names).items():
        found[name] = [Selections(leaf=leaves[name], parts=selections)]
    selected = {id(w) for parts in found.values() for one in parts for w, _ in one.parts}  # type: ignore[attr-defined]
    for w, held in functions:
        if id(w) in selected:
            continue
        parents = sorted(leaves_of(w), key=lambda leaf: -leaf.ndim)
        pair = None
        if len(parents) == 2 and all(id(leaf) in names for leaf in parents):
            pair = standard.contributions(w, held, *parents)
        if pair is not None:
            for leaf, contribution in zip(parents, pair, strict=True):
                found.setdefault(names[id(leaf)], []).append(contribution)
            continue
        gradients = torch.autograd.grad(
            w, list(leaves.values()), held.rows(), is_grads_batched=True, allow_unused=True, retain_graph=True
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                found.setdefault(name, []).append(Rows(data=wide(gradient)))
    return found


@dataclass(frozen=True, kw_only=True)
class Selections:
    """Contributions to ``parts`` of ``leaf``, each of whose numbers is in at most one of them, once: norms add up."""

    leaf: Tensor
    parts: list[tuple[Tensor, Contribution]]

    def squared_norms(self) -> Tensor:
        """``[B]``."""
        return functools.reduce(torch.add, (held.squared_norms() for _, held in self.parts))

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """Each sum put where its part is."""
        return self._put([held.weighted_sum(factors, finite) for _, held in self.parts], batched=False)

    def rows(self) -> Tensor:
        """``[B, *shape]``."""
        return self._put([held.rows() for _, held in self.parts], batched=True)

    def _put(self, values: list[Tensor], batched: bool) -> Tensor:
        total = None
        for (w, _), value in zip(self.parts, values, strict=True):
            (put,) = torch.autograd.grad(w, self.leaf, value.to(w), is_grads_batched=batched, retain_graph=True)
            total = put if total is None else total.add_(put)
        assert total is not None
        return total


def _selections(
    functions: list[tuple[Tensor, Contribution]], names: dict[int, str]
) -> dict[str, list[tuple[Tensor, Contribution]]]:
    """By parameter, contributions to functions that are copies of numbers of it alone, none of them twice."""
    found: dict[str, list[tuple[Tensor, Contribution]]] = {}
    leaves: dict[str, Tensor] = {}
    for w, held in functions:
        nodes = list(_nodes(w))
        if any(type(node).__name__ not in COPIES and not _is_leaf(node) for node in nodes):
            continue
        parents = leaves_of(w)
        if len(parents) == 1 and (name := names.get(id(leaf := parents[0]))) is not None:
            leaves[name] = leaf
            found.setdefault(name, []).append((w, held))
    return {name: parts for name, parts in found.items() if _apart(leaves[name], parts)}


def _apart(leaf: Tensor, parts: list[tuple[Tensor, Contribution]]) -> bool:
    """Whether each number of ``leaf`` is in ``parts`` once at most."""
    ones = [torch.ones_like(w) for w, _ in parts]
    (count,) = torch.autograd.grad([w for w, _ in parts], leaf, ones, retain_graph=True)
    return bool((count <= 1).all())


def _nodes(function: Tensor) -> Iterator[Any]:
    """Each node of the graph behind ``function`` once."""
    waiting: list[Any] = [function.grad_fn]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [behind for behind, _ in node.next_functions]


def _is_leaf(node: Any) -> bool:
    return type(node) is ACCUMULATES
