"""From a bounded sum to a private mean, and what it cost."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fed_dpsat.accounting.event import DISTRIBUTIONS, PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.clipping.base import check_clip_norm, plain_number
from fed_dpsat.step.noise import standard_laplaces, standard_normals
from fed_dpsat.step.secure_laplace import add_laplace_on_grid
from fed_dpsat.step.secure_noise import SystemGenerator, add_noise_on_grid


@dataclass(frozen=True, kw_only=True)
class Mechanism(ABC):
    """Noise on the SUM, scaled to ``noise_multiplier * clip_norm``; then the mean. A subclass has its distribution."""

    noise_multiplier: float
    clip_norm: float
    expected_batch_size: float
    norm: ClassVar[str]
    deviation: ClassVar[float]
    distribution: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_clip_norm(self.clip_norm))
        for name in ("noise_multiplier", "expected_batch_size"):  # read once: a tensor can be another number later
            object.__setattr__(self, name, plain_number(name, getattr(self, name)))
        if not 0 <= self.noise_multiplier < math.inf:
            raise SettingError(
                "noise_multiplier", self.noise_multiplier, "in [0, inf)", "`fed-dpsat calibrate` finds one"
            )
        if self.noise_multiplier > 0 and math.isinf(self.clip_norm):
            raise SettingError(
                "clip_norm",
                self.clip_norm,
                "finite while noise is added",
                "noise needs a bound to be scaled to",
            )
        if not 0 < self.expected_batch_size < math.inf:
            raise SettingError(
                "expected_batch_size", self.expected_batch_size, "above 0", "it is sample_rate * num_examples"
            )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in a coordinate of the private mean, a public number.

        That of a ``SystemGenerator`` is wider, by 0.02 % at a million parameters.
        """
        if not self.noise_multiplier:
            return 0.0
        return self.deviation * self.noise_multiplier * self.clip_norm / self.expected_batch_size

    @property
    def scale(self) -> float:
        """What noise of scale 1 is multiplied with before it is added to the sum."""
        return self.noise_multiplier * self.clip_norm

    def privatize(self, clipped_sum: Params, generator: np.random.Generator) -> Params:
        """``(clipped_sum + noise) / expected_batch_size``, shapes as given; Abadi et al. 2016, Algorithm 1.

        A ``SystemGenerator`` has its noise added on a grid, and slightly wider (``fed_dpsat.step.secure_noise``).
        Without noise and at a size of 1 the tensors are those of the sum.
        """
        if self.noise_multiplier and isinstance(generator, SystemGenerator):
            noisy_sum = self._add_on_grid(clipped_sum, generator)
        elif self.noise_multiplier:
            noisy_sum = self._add_noise(clipped_sum, generator)
        elif self.expected_batch_size == 1:
            return dict(clipped_sum)
        else:
            return {name: total / self.expected_batch_size for name, total in clipped_sum.items()}
        return {name: total.div_(self.expected_batch_size) for name, total in noisy_sum.items()}

    def event(self, *, sample_rate: float, steps: int, unit: str = "example") -> PrivacyEvent:
        """What ``steps`` calls on Poisson batches at ``sample_rate`` cost one ``unit``: an example, or a user."""
        kind = DISTRIBUTIONS[unit][self.distribution]
        return PrivacyEvent(noise_multiplier=self.noise_multiplier, sample_rate=sample_rate, steps=steps, kind=kind)

    def _add_noise(self, clipped_sum: Params, generator: np.random.Generator) -> Params:
        noisy_sum = {}
        for name, drawn in self._drawn(clipped_sum, generator).items():
            total = clipped_sum[name]
            noise = drawn.to(total)
            noisy_sum[name] = torch.add(total, noise, alpha=self.scale, out=noise)
        return noisy_sum

    @abstractmethod
    def _drawn(self, clipped_sum: Params, generator: np.random.Generator) -> Params:
        """Noise of scale 1 with the names and shapes of ``clipped_sum``."""

    @abstractmethod
    def _add_on_grid(self, clipped_sum: Params, generator: SystemGenerator) -> Params:
        """``clipped_sum`` with the noise of a ``SystemGenerator``."""


class GaussianMechanism(Mechanism):
    """Noise on the SUM, clipped in L2 norm, with standard deviation ``noise_multiplier * clip_norm``; then the mean.

    =========================== ==================================================
    case                        result
    =========================== ==================================================
    empty batch, zero sum       noise / expected_batch_size: a step like any other
    noise_multiplier 0          the sum / expected_batch_size; its event is infinite
    clip_norm inf               only with noise_multiplier 0
    =========================== ==================================================

    One normal is drawn per coordinate, as ``normals_like`` says. Raises ``SettingError`` for NaN or negative noise, no
    bound on the sum, no batch to divide by, or what is no number.
    """

    norm, deviation, distribution = "L2", 1.0, "gaussian"

    def _drawn(self, clipped_sum: Params, generator: np.random.Generator) -> Params:
        return normals_like(clipped_sum, generator)

    def _add_on_grid(self, clipped_sum: Params, generator: SystemGenerator) -> Params:
        return add_noise_on_grid(
            clipped_sum, noise_multiplier=self.noise_multiplier, clip_norm=self.clip_norm, generator=generator
        )


class LaplaceMechanism(Mechanism):
    """Laplace noise of scale ``noise_multiplier * clip_norm`` on each number of the SUM, clipped in L1 norm.

    For private numbers alone, each with a name (``zeroth-order``): of a tensor, clipping sees one norm, which is no
    bound of the L1 norm of its coordinates. DP-ZO, Tang et al. 2024 (arXiv 2401.04343). Also raises ``SettingError``
    for the sum of a tensor.
    """

    norm, deviation, distribution = "L1", math.sqrt(2), "laplace"

    def privatize(self, clipped_sum: Params, generator: np.random.Generator) -> Params:
        """As ``Mechanism.privatize``, of numbers alone."""
        tensors = [f"{name}{list(total.shape)}" for name, total in clipped_sum.items() if total.numel() != 1]
        if tensors:
            raise SettingError(
                "noise_distribution",
                "laplace",
                f"possible for an optimizer that releases gradients of parameters ({tensors[0]}), whose L1 norm no "
                "clipping bounds",
                "use optimizer=zeroth-order, or noise_distribution=gaussian",
            )
        return super().privatize(clipped_sum, generator)

    def _drawn(self, clipped_sum: Params, generator: np.random.Generator) -> Params:
        drawn = standard_laplaces(generator, len(clipped_sum))
        return {name: one.view(clipped_sum[name].shape) for name, one in zip(clipped_sum, drawn, strict=True)}

    def _add_on_grid(self, clipped_sum: Params, generator: SystemGenerator) -> Params:
        return add_laplace_on_grid(
            clipped_sum, noise_multiplier=self.noise_multiplier, clip_norm=self.clip_norm, generator=generator
        )


MECHANISMS: Mapping[str, type[Mechanism]] = {"gaussian": GaussianMechanism, "laplace": LaplaceMechanism}
"""The mechanism of each choice of ``noise_distribution``."""


def normals_like(tensors: Params, generator: np.random.Generator) -> Params:
    """Standard normals in float32 with the names and shapes of ``tensors``, cut in their order from one draw."""
    sizes = [t.numel() for t in tensors.values()]
    drawn = torch.split(standard_normals(generator, sum(sizes)), sizes)
    return {name: normals.view(t.shape) for (name, t), normals in zip(tensors.items(), drawn, strict=True)}
