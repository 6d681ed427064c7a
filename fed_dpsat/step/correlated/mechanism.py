"""The Gaussian mechanism with correlated noise: its calls in order, in the place of the calls of an independent one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.params import Params
from fed_dpsat.step.correlated.base import Factorization, Stream
from fed_dpsat.step.correlated.sensitivity import Participation
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import standard_normals
from fed_dpsat.step.secure_noise import SystemGenerator, add_normals_on_grid


@dataclass(frozen=True, kw_only=True)
class CorrelatedMechanism(GaussianMechanism):
    """``GaussianMechanism`` whose noise at call t is row t of C^-1 z, z of deviation ``noise_multiplier * clip_norm``
    times the sensitivity of C under ``participation``.

    All calls together are one Gaussian mechanism of ``noise_multiplier``, for sums that adapt to earlier results. It
    holds the state of the noise, which allows to subtract the noise. A call beyond the last step raises
    ``StreamError`` before it draws.
    """

    factorization: Factorization
    participation: Participation
    sensitivity: float = field(init=False)
    state: Stream = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sensitivity", self.factorization.sensitivity(self.participation))
        object.__setattr__(self, "state", self.factorization.stream())

    @property
    def scale(self) -> float:
        """The standard deviation of z."""
        return self.noise_multiplier * self.clip_norm * self.sensitivity

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in a coordinate of the next private mean, a public number."""
        step = min(self.state.taken, self.participation.num_steps - 1)
        return super().noise_std * self.sensitivity * float(self.factorization.deviations()[step])

    def skip(self, size: int, generator: np.random.Generator) -> None:
        """Draw the noise of a step that was released earlier, of ``size`` coordinates, and add it to nothing."""
        self._next(size, generator)

    def _drawn(self, clipped_sum: Params, generator: np.random.Generator) -> Params:
        sizes = [total.numel() for total in clipped_sum.values()]
        parts = torch.split(self._next(sum(sizes), generator), sizes)
        return {name: part.view(clipped_sum[name].shape) for name, part in zip(clipped_sum, parts, strict=True)}

    def _add_on_grid(self, clipped_sum: Params, generator: SystemGenerator) -> Params:
        """The sum and the noise of the step are rounded to the grid, the kept noise is not."""
        return add_normals_on_grid(
            clipped_sum,
            self._drawn(clipped_sum, generator),
            noise_multiplier=self.noise_multiplier * self.sensitivity,
            clip_norm=self.clip_norm,
        )

    def _next(self, size: int, generator: np.random.Generator) -> Tensor:
        def draw() -> Tensor:
            if isinstance(generator, SystemGenerator):
                return torch.from_numpy(generator.standard_normal(size))
            return standard_normals(generator, size)

        return self.state.next(draw, self.state.taken + 1)
