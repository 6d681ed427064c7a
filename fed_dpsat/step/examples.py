"""Batches of examples: a tensor, or a tree (dictionaries, tuples, lists) of tensors, that all begin with the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Examples = Any
"""``[B, ...]``, or a tree of such: tokens with a mask, several inputs of a module, its keyword arguments."""


def count(examples: Examples) -> int:
    """``B``. Raises ``ValueError`` for no tensor, and for tensors that begin with different numbers."""
    if isinstance(examples, Tensor):  # a step asks several times, and a tree takes as long as a small layer
        return len(examples)
    sizes = {len(leaf) for leaf in tree_leaves(examples)}
    if len(sizes) != 1:
        raise ValueError(f"examples whose tensors begin with {sorted(sizes) or 'nothing'}: each begins with the batch")
    return int(sizes.pop())


def some(examples: Examples, part: slice) -> Examples:
    """The examples of ``part``."""
    return examples[part] if isinstance(examples, Tensor) else tree_map(lambda t: t[part], examples)


def joined(each: list[Examples]) -> Examples:
    """All of ``each``, one after the other."""
    return tree_map(lambda *tensors: torch.cat(tensors), *each)


def device_of(examples: Examples) -> torch.device:
    """Where the tensors are."""
    first: Tensor = examples if isinstance(examples, Tensor) else tree_leaves(examples)[0]
    return first.device
