"""A mechanism of one's own: all numbers come from the noise that its stream makes of unit vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.plugins import PluginError
from fed_dpsat.step.correlated.base import Stream
from fed_dpsat.step.correlated.sensitivity import Participation, Vector, matrix_sensitivity

MOST_STEPS = 1000
TOLERANCE = 1e-9


class OwnMechanism(Protocol):
    """What a mechanism of one's own has: ``stream()``, a new ``Stream`` that draws once at each step."""

    def stream(self) -> Stream:
        """The noise C^-1 z of an invertible lower-triangular C, from the first step on."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The factorisation whose inverse ``inverse[n, n]`` is the noise of a stream for unit vectors."""

    inverse: Vector = field(repr=False)
    stream: Callable[[], Stream]

    @classmethod
    def of(cls, own: OwnMechanism, num_steps: int) -> Measured:
        """Raises ``PluginError`` for noise that is no such matrix, ``SettingError`` for too many steps to measure."""
        if num_steps > MOST_STEPS:
            bound = f"at most {MOST_STEPS} with a noise_mechanism of your own, whose matrix is measured"
            raise SettingError("num_rounds", num_steps, bound, "lower it, or use band-mf, blt, bisr or tree")
        inverse, again = measured(own, num_steps, 1.0), measured(own, num_steps, -2.0)
        if not np.allclose(again, -2 * inverse, rtol=TOLERANCE, atol=TOLERANCE):
            raise PluginError("noise_mechanism: its noise is no linear function of what it draws; return C^-1 z")
        if not np.allclose(inverse, np.tril(inverse)) or not (np.abs(np.diag(inverse)) > TOLERANCE).all():
            raise PluginError(
                "noise_mechanism: its noise of a step lacks the draw of that step, or has a later one; C is "
                "lower-triangular and invertible"
            )
        return cls(inverse=inverse, stream=own.stream)

    @property
    def num_steps(self) -> int:
        """n."""
        return len(self.inverse)

    def sensitivity(self, participation: Participation) -> float:
        """An upper bound, ``matrix_sensitivity`` of the inverse of the inverse."""
        return matrix_sensitivity(np.linalg.inv(self.inverse).astype(np.float64), participation)

    def prefix_variances(self) -> Vector:
        """``[n]``, in units of z."""
        variances: Vector = np.square(np.cumsum(self.inverse, axis=0)).sum(axis=1)
        return variances

    def deviations(self) -> Vector:
        """``[n]``, in units of z."""
        deviations: Vector = np.sqrt(np.square(self.inverse).sum(axis=1))
        return deviations


def noise_matrix(stream: Stream, num_steps: int) -> Vector:
    """``[n, m]``: the noise of each step as a sum of its draws, of which a tree has up to 2 n."""
    units, drawn = torch.eye(2 * num_steps, dtype=torch.float64), 0

    def draw() -> Tensor:
        nonlocal drawn
        drawn += 1
        return units[drawn - 1].clone()

    return np.stack([stream.next(draw, step).numpy() for step in range(1, num_steps + 1)])[:, :drawn]


def measured(own: OwnMechanism, num_steps: int, scale: float) -> Vector:
    """``[n, n]``: the noise of each step for draws of ``scale`` times the unit vectors, in float64.

    Raises ``PluginError`` for a stream that draws more or less than once at a step.
    """
    stream, rows, units = own.stream(), [], scale * torch.eye(num_steps, dtype=torch.float64)
    drawn = 0

    def draw() -> Tensor:
        nonlocal drawn
        drawn += 1
        return units[min(drawn, num_steps) - 1].clone()

    for step in range(1, num_steps + 1):
        rows.append(stream.next(draw, step).numpy().astype(np.float64))
        if drawn != step:
            raise PluginError(f"noise_mechanism: it drew {drawn} times in {step} steps; draw once at each step")
    return np.stack(rows)
