"""Tree aggregation, online: noise on the nodes of a binary tree over the steps, with Honaker's averages.

A node of level l covers 2^l steps, and is complete when its last step is. Its noisy sum is known from its own noise and
from its two halves; the average of least variance has ``V_l = 1 / (2 (1 - 2^-(l+1)))`` (Honaker 2015; arXiv 2103.00039,
section 4). The noise of the partial sum at t is that of the nodes of the binary digits of t, and the noise of a step is
what it adds to that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fed_dpsat.step.correlated.base import Draw, Stream
from fed_dpsat.step.correlated.sensitivity import Participation, Vector


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Tree aggregation: noise on the nodes of a binary tree over the steps; keeps about log2(steps) models.

    The rows of C are the complete nodes, with a 1 for each step that a node covers.
    """

    num_steps: int

    @property
    def levels(self) -> int:
        """The number of levels that have a complete node."""
        return self.num_steps.bit_length()

    def sensitivity(self, participation: Participation) -> float:
        """An upper bound: the worst pattern of each level for itself; exact for a fixed order.

        All entries of C^T C are at least 0, so it is the number of participations in each node, squared and added up.
        """
        if participation.fixed_order:
            firsts = range(min(participation.min_separation, self.num_steps))
            return math.sqrt(max(self._in_order(first, participation) for first in firsts))
        return math.sqrt(sum(self._on_level(level, participation) for level in range(self.levels)))

    def prefix_variances(self) -> Vector:
        """``[n]``, in units of z."""
        steps, total = np.arange(1, self.num_steps + 1), np.zeros(self.num_steps)
        for level in range(self.levels):
            total += (steps >> level & 1) * _variance(level)
        return total

    def deviations(self) -> Vector:
        """``[n]``, in units of z."""
        found = [math.sqrt(_step_variance(level)) for level in range(self.levels)]
        return np.array([found[_completed(step)] for step in range(1, self.num_steps + 1)])

    def stream(self) -> Stream:
        """A draw for each node that a step completes, two on average; keeps a tensor for each digit of the step."""
        return TreeStream(self.num_steps)

    def _on_level(self, level: int, participation: Participation) -> float:
        of_node = min(participation.most, math.ceil(2**level / participation.min_separation))
        nodes = self.num_steps >> level
        full, rest = divmod(participation.most, of_node)
        return float(nodes * of_node**2 if full >= nodes else full * of_node**2 + rest**2)

    def _in_order(self, first: int, participation: Participation) -> float:
        steps = np.arange(first, self.num_steps, participation.min_separation)[: participation.most]
        counts = (np.bincount(steps >> level)[: self.num_steps >> level] for level in range(self.levels))
        return float(sum(np.square(count).sum() for count in counts))


NOISE_MECHANISMS = {"tree": Tree}


class TreeStream(Stream):
    """The noise of ``Tree``: what each step adds to the noise of the partial sum."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(num_steps)
        self._nodes: list[Tensor] = []  # averages of the complete nodes of the digits of `taken`, largest first

    def _next(self, draw: Draw) -> Tensor:
        node, noise = draw(), None
        for level in range(1, _completed(self.taken) + 1):
            before = self._nodes.pop()
            own = _own_share(level)
            node = (node + before).mul_(1 - own).add_(draw(), alpha=own)
            noise = before if noise is None else noise.add_(before)
        self._nodes.append(node)
        return node.clone() if noise is None else node - noise


def _completed(step: int) -> int:
    """The level of the largest node that ``step`` completes."""
    return (step & -step).bit_length() - 1


def _variance(level: int) -> float:
    """Of the average of a node of ``level``."""
    return 1 / (2 * (1 - 2.0 ** -(level + 1)))


def _own_share(level: int) -> float:
    """The weight of a node's own noisy sum beside those of its halves: their inverse variances."""
    return 2 * _variance(level - 1) / (1 + 2 * _variance(level - 1))


def _step_variance(level: int) -> float:
    """Of the noise of a step that completes a node of ``level`` and no larger one.

    The node before it on each lower level leaves the partial sum with weight -1, and comes back in the averages.
    """
    total, weight = 0.0, 1.0
    for below in range(level, 0, -1):
        own = _own_share(below)
        total += (weight * own) ** 2
        weight *= 1 - own
        total += (weight - 1) ** 2 * _variance(below - 1)
    return total + weight**2
