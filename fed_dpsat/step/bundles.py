"""Rows of a batch that are bounded together: the views of one example, or the examples of one person.

Every row goes through the model by itself. A bundle's gradient is the weighted sum over its rows; its norm is clipped
once, so a bundle adds at most ``clip_norm`` to a sum, however many rows it has. A bundle with fewer rows than others is
filled up with rows of its own of weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fed_dpsat.step.draws import Draws
from fed_dpsat.step.examples import Examples, some


@dataclass(frozen=True, eq=False)
class Bundles:
    """``weights[G, R]``, finite and at least 0, of the rows of a batch ``[G * R, ...]``, bundle after bundle.

    Raises ``ValueError`` for weights of another form.
    """

    weights: Tensor

    def __post_init__(self) -> None:
        weights = self.weights
        if weights.ndim != 2 or not weights.shape[1] or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(f"weights {list(weights.shape)} of bundles; they are [G, R], finite and at least 0")

    @property
    def rows(self) -> int:
        """``R``."""
        return self.weights.shape[1]

    def some(self, part: slice) -> Bundles:
        """The bundles of ``part``, a slice of rows that divides no bundle."""
        return Bundles(self.weights[part.start // self.rows : part.stop // self.rows])

    def weighted(self, losses: Tensor) -> Tensor:
        """``losses[G * R]``, each times its weight: their gradients are the rows that are summed."""
        return losses * self.weights.flatten().to(losses)

    def sums(self, rows: Tensor) -> Tensor:
        """``[G, ...]``, weighted sums of ``rows[G * R, ...]``."""
        return torch.einsum("gr,gr...->g...", self.weights.to(rows), rows.view(*self.weights.shape, *rows.shape[1:]))


class Part(NamedTuple):
    """A batch of rows of one shape, what they draw, and how they are bundled; without ``bundles`` each is alone."""

    batch: tuple[Examples, Tensor]
    draws: Draws
    bundles: Bundles | None = None

    @property
    def weights(self) -> Tensor:
        """``[G, R]``, ones without ``bundles``."""
        return torch.ones(len(self.draws), 1) if self.bundles is None else self.bundles.weights

    def some(self, rows: slice) -> Part:
        """The rows of a slice that divides no bundle."""
        inputs, targets = self.batch
        batch = some(inputs, rows), some(targets, rows)
        return Part(batch, self.draws.some(rows), None if self.bundles is None else self.bundles.some(rows))
