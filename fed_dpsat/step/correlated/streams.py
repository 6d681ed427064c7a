"""Streams of correlated noise that keep earlier noise: a ring of it, or exponentially weighted sums."""

from __future__ import annotations

import torch
from torch import Tensor

from fed_dpsat.step.correlated.base import Draw, Stream
from fed_dpsat.step.correlated.sensitivity import Vector

COORDINATES = 1 << 15
"""At a time: what buffers do to them stays in the cache."""


class RingStream(Stream):
    """w_t = first z_t + sum_j rest_j v_{t-j}, with v the earlier w if it ``keeps_noise``, else the earlier z.

    Keeps ``len(rest)`` tensors in the type that is drawn.
    """

    def __init__(self, num_steps: int, first: float, rest: Vector, *, keeps_noise: bool) -> None:
        super().__init__(num_steps)
        self._first, self._rest, self._keeps_noise = float(first), torch.from_numpy(rest.copy()), keeps_noise
        self._ring: Tensor | None = None

    def _next(self, draw: Draw) -> Tensor:
        drawn = draw()
        if not len(self._rest):
            return drawn if self._first == 1 else drawn * self._first
        if self._ring is None:
            self._ring = drawn.new_zeros(len(self._rest), len(drawn))
        at = (self.taken - 1) % len(self._rest)
        # Row i of the ring is from the step of the same remainder: the newest one is before row `at`.
        weights = self._rest.flip(0).roll(at).to(drawn)
        noise = torch.addmv(drawn, self._ring.T, weights, beta=self._first)
        self._ring[at] = noise if self._keeps_noise else drawn
        return noise


class BufferStream(Stream):
    """w_t = z_t - sum_j omega_j S_j, then S_j <- theta_j S_j + w_t. Keeps the S in the type that is drawn."""

    def __init__(self, num_steps: int, theta: Vector, omega: Vector) -> None:
        super().__init__(num_steps)
        self._pairs = list(zip(theta.tolist(), omega.tolist(), strict=True))
        self._buffers: Tensor | None = None

    def _next(self, draw: Draw) -> Tensor:
        drawn = draw()
        if self._buffers is None:
            self._buffers = drawn.new_zeros(len(self._pairs), len(drawn))
        noise = torch.empty_like(drawn)
        for start in range(0, len(drawn), COORDINATES):
            part = slice(start, start + COORDINATES)
            of_part, buffers = noise[part].copy_(drawn[part]), self._buffers[:, part]
            for buffer, (_, omega) in zip(buffers, self._pairs, strict=True):
                of_part.add_(buffer, alpha=-omega)
            for buffer, (theta, _) in zip(buffers, self._pairs, strict=True):
                torch.add(of_part, buffer, alpha=theta, out=buffer)
        return noise
