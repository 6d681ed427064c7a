"""Coins and noise fit for deployment: a cryptographic generator, and noise that floating point does not betray.

The bit generators are randomgen's, the one maintained package that plugs ciphers into numpy (AES-128 in counter
mode where the CPU has instructions for it, else ChaCha20), because they keep ``np.random.Generator`` whole and
draw normals as fast as numpy's own do. torchcsprng is dead, the operating system itself needs 15 times longer
for the bits alone, and OpenSSL's keystream (the oracle in our tests) would leave the normals to us.

Protected:

- The draws. A generator's 256 bits of operating-system entropy (AES: key and first counter) are used once; no draw
  tells anything of another.
- The low bits. float32 noise lies on a lattice that moves with the sum, so that one coordinate can prove that its
  sum was not 1 (Mironov 2012; Jin et al. 2022, arXiv 2112.05307). The sum of 4 Gaussians of Opacus'
  ``secure_mode`` (Holohan & Braghin 2021) hides the generator's words but not the lattice: in float32 one
  coordinate in 10 still proves it (tests/step/test_secure_noise.py). Here the sum is rounded to a grid BEFORE it meets
  noise on the same grid: what comes out is the Gaussian mechanism's result, rounded, whatever the data, and the
  cast to float32 is post-processing. Rounding raises the sensitivity to C + grid * sqrt(d); the noise is scaled to
  that.

Not protected:

- The probability of each grid point is that of numpy's float64 ziggurat: some 2^27 floats per cell, so true to
  about one part in 2^27, and porous beyond 9 standard deviations (probability 1e-19). An exact discrete
  Gaussian (Canonne et al. 2020) has neither flaw, is far slower, and its running time tells more.
- The sum it is given: float32 rounding while examples are added lets one of them move it by more than C
  (Casacuberta et al. 2022, arXiv 2207.10635): by 1e-6 C where we looked (tanh-cnn, batch 512), without a proof.
- Time, which tells the size of the batch and a little of the noise; memory, core dumps and cloned machines.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from typing import Any, NoReturn
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from randomgen import AESCounter, ChaCha  # type: ignore[import-untyped]
from torch import Tensor

GRID_BITS = 22
"""The grid is 2^-22 of the noise: coarse beside float64, and for a million parameters C grows by sigma * 0.02 %."""


class SystemGenerator(np.random.Generator):
    """A generator with a key of its own from the operating system; a forked child's copy gets another one.

    It cannot be seeded, copied or pickled: a second one with the same key would repeat its noise (``TypeError``).
    """

    def __init__(self) -> None:
        super().__init__(_bit_generator())
        _ALIVE.add(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SystemGenerator cannot be copied or pickled: make one where it is needed")

    def spawn(self, n_children: int) -> NoReturn:
        raise TypeError("a SystemGenerator has no children: make as many as are needed")


def system_generator() -> SystemGenerator:
    """A generator that was never there before and never will be again."""
    return SystemGenerator()


def add_noise_on_grid(
    clipped_sum: Mapping[str, Tensor],
    *,
    noise_multiplier: float,
    clip_norm: float,
    generator: SystemGenerator,
    clients: int = 1,
) -> dict[str, Tensor]:
    """``clipped_sum + N(0, (noise_multiplier * (clip_norm + grid * sqrt(d)))^2)`` on the grid, shapes as given.

    ``d`` counts all coordinates of a sum; with several ``clients``, each tensor has a sum of each. Computed on the CPU
    in float64, returned in the types and on the devices given.
    """
    size = sum(total.numel() for total in clipped_sum.values()) // clients
    std, grid = std_and_grid(noise_multiplier, clip_norm, size)
    return {
        name: _noisy(total, std, grid, generator.standard_normal(total.numel())) for name, total in clipped_sum.items()
    }


def add_normals_on_grid(
    clipped_sum: Mapping[str, Tensor], normals: Mapping[str, Tensor], *, noise_multiplier: float, clip_norm: float
) -> dict[str, Tensor]:
    """``add_noise_on_grid`` of given ``normals`` in float64, which it leaves as they are."""
    std, grid = std_and_grid(noise_multiplier, clip_norm, sum(total.numel() for total in clipped_sum.values()))
    return {
        name: _noisy(total, std, grid, normals[name].flatten().numpy().copy()) for name, total in clipped_sum.items()
    }


def std_and_grid(noise_multiplier: float, clip_norm: float, size: int) -> tuple[float, float]:
    """The deviation of the noise on ``size`` coordinates, and the power of two that all are multiples of.

    Two sums at most C apart are at most C + grid * sqrt(size) apart once each is rounded, by half a grid per
    coordinate.
    """
    grid = grid_of(noise_multiplier * clip_norm)
    return noise_multiplier * (clip_norm + grid * math.sqrt(size)), grid


def grid_of(scale: float) -> float:
    """The power of two that sums and noise of this ``scale`` are multiples of."""
    return 2.0 ** (math.frexp(scale)[1] - 1 - GRID_BITS)


def _noisy(total: Tensor, std: float, grid: float, noise: NDArray[np.float64]) -> Tensor:
    noise *= std / grid
    steps = torch.from_numpy(np.rint(noise, out=noise)).view(total.shape)
    # float64 addition rounds the exact sum of the two integers: also beyond 2^53 a function of that sum alone.
    steps += torch.round(total.to("cpu", torch.float64) / grid)
    return (steps * grid).to(total)


def _bit_generator() -> Any:
    generator = AESCounter(key=secrets.randbits(128), counter=secrets.randbits(128))
    # Without the instructions AES looks up tables, which a neighbour on the machine can time.
    return generator if generator.use_aesni else ChaCha(key=secrets.randbits(256), rounds=20)


_ALIVE: WeakSet[SystemGenerator] = WeakSet()


def _rekey_all() -> None:
    for generator in list(_ALIVE):
        generator.bit_generator.state = _bit_generator().state


os.register_at_fork(after_in_child=_rekey_all)
