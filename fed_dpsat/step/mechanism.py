"""From a bounded sum to a private mean, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.step.clipping.base import check_clip_norm, plain_number
from fed_dpsat.step.noise import standard_normals
from fed_dpsat.step.secure_noise import SystemGenerator, add_noise_on_grid


@dataclass(frozen=True, kw_only=True)
class GaussianMechanism:
    """Noise on the SUM with standard deviation ``noise_multiplier * clip_norm``; then the mean.

    =========================== ==================================================
    case                        result
    =========================== ==================================================
    empty batch, zero sum       noise / expected_batch_size: a step like any other
    noise_multiplier 0          the sum / expected_batch_size; its event is infinite
    clip_norm inf               only with noise_multiplier 0
    =========================== ==================================================

    Raises ``SettingError`` for NaN or negative noise, no bound on the sum, no batch to divide by, or what is no number.
    """

    noise_multiplier: float
    clip_norm: float
    expected_batch_size: float

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
        return self.noise_multiplier * self.clip_norm / self.expected_batch_size if self.noise_multiplier else 0.0

    def privatize(self, clipped_sum: Params, generator: np.random.Generator) -> Params:
        """``(clipped_sum + N(0, (noise_multiplier * clip_norm)^2)) / expected_batch_size``, shapes as given.

        Draws one normal per coordinate, as ``normals_like`` says; Abadi et al. 2016, Algorithm 1. A
        ``SystemGenerator`` has its noise added on a grid, and slightly wider (``fed_dpsat.step.secure_noise``).
        Without noise and at a size of 1 the tensors are those of the sum.
        """
        if self.noise_multiplier and isinstance(generator, SystemGenerator):
            noisy_sum = add_noise_on_grid(
                clipped_sum,
                noise_multiplier=self.noise_multiplier,
                clip_norm=self.clip_norm,
                generator=generator,
            )
        elif self.noise_multiplier:
            noisy_sum = self._add_noise(clipped_sum, generator)
        elif self.expected_batch_size == 1:
            return dict(clipped_sum)
        else:
            return {name: total / self.expected_batch_size for name, total in clipped_sum.items()}
        return {name: total.div_(self.expected_batch_size) for name, total in noisy_sum.items()}

    def _add_noise(self, clipped_sum: Params, generator: np.random.Generator) -> Params:
        scale, noisy_sum = self.noise_multiplier * self.clip_norm, {}
        for name, normals in normals_like(clipped_sum, generator).items():
            total = clipped_sum[name]
            noise = normals.to(total)
            noisy_sum[name] = torch.add(total, noise, alpha=scale, out=noise)
        return noisy_sum

    def event(self, *, sample_rate: float, steps: int) -> PrivacyEvent:
        """What ``steps`` calls on Poisson batches at ``sample_rate`` cost one example."""
        return PrivacyEvent(noise_multiplier=self.noise_multiplier, sample_rate=sample_rate, steps=steps)


def normals_like(tensors: Params, generator: np.random.Generator) -> Params:
    """Standard normals in float32 with the names and shapes of ``tensors``, cut in their order from one draw."""
    sizes = [t.numel() for t in tensors.values()]
    drawn = torch.split(standard_normals(generator, sum(sizes)), sizes)
    return {name: normals.view(t.shape) for (name, t), normals in zip(tensors.items(), drawn, strict=True)}
