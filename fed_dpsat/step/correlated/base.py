"""A correlated mechanism as a factorisation, and the stream of its noise.

Of contributions x_1, ..., x_n the mechanism releases ``y = x + s C^-1 z`` with independent normals z. That is
post-processing of ``C x + s z``, so one Gaussian mechanism covers all steps (arXiv 2202.08312, for x that adapts to
earlier y). The noise of a partial sum of y is ``s B z`` with B = A C^-1 and A the lower triangle of ones: C is chosen
so that it cancels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fed_dpsat.errors import RunError
from fed_dpsat.step.correlated.sensitivity import Participation, Vector

Draw = Callable[[], Tensor]
"""Gives independent standard normals ``[d]``, others at each call."""


class StreamError(RunError):
    """A step beyond the last one of a stream of noise, or out of turn; nothing was drawn."""


class Stream(ABC):
    """The noise of the steps 1 to ``num_steps``, each ``[d]`` and once, in the scale of z; ``taken`` were given out."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.taken = num_steps, 0

    def next(self, draw: Draw, step: int) -> Tensor:
        """The noise of ``step``, in new memory; raises ``StreamError`` unless it is the next one, before it draws."""
        self.check(step)
        self.taken = step
        return self._next(draw)

    def check(self, step: int) -> None:
        """Raise ``StreamError`` unless ``step`` is the next one."""
        if step != self.taken + 1:
            raise StreamError(f"noise of step {step} was asked after step {self.taken}: a stream gives each step once")
        if step > self.num_steps:
            raise StreamError(
                f"the noise covers {self.num_steps} steps, and step {step} was asked: its whole schedule was charged "
                "before the first one; start a new run"
            )

    @abstractmethod
    def _next(self, draw: Draw) -> Tensor: ...


class Factorization(Protocol):
    """C of one mechanism over ``num_steps`` steps; a mechanism of one's own has these five."""

    @property
    def num_steps(self) -> int:
        """n, the number of steps."""

    def sensitivity(self, participation: Participation) -> float:
        """How far one participant moves ``C x`` in norm at most, if each step moves by at most 1."""

    def prefix_variances(self) -> Vector:
        """``[n]``: the variance of the noise in each partial sum, in units of z; the rows of B, squared."""

    def deviations(self) -> Vector:
        """``[n]``: the standard deviation of the noise of each single step, in units of z."""

    def stream(self) -> Stream:
        """A new stream of the noise ``C^-1 z``."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Root mean square and largest deviation of partial sums, at a noise multiplier and a clip norm of 1."""

    sensitivity: float
    mean: float
    largest: float


def errors(factorization: Factorization, participation: Participation) -> Errors:
    """The errors of partial sums under ``participation``, with the noise that its sensitivity asks for."""
    scale, variances = factorization.sensitivity(participation), factorization.prefix_variances()
    return Errors(
        sensitivity=scale,
        mean=scale * math.sqrt(float(np.mean(variances))),
        largest=scale * math.sqrt(float(np.max(variances))),
    )
