"""Toeplitz factorisations: one coefficient for each distance between two steps.

The first column c of C, r of its inverse and b of B are power series, with b = 1 / (c (1 - x)), cut after ``num_steps``
coefficients. ``BISR`` cuts r of the square root after ``bands`` coefficients (arXiv 2505.12128): it needs no fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fed_dpsat.errors import SettingError
from fed_dpsat.step.correlated.base import Stream
from fed_dpsat.step.correlated.sensitivity import Participation, Vector, toeplitz_sensitivity
from fed_dpsat.step.correlated.streams import RingStream


def series(numerator: Vector, denominator: Vector, count: int) -> Vector:
    """The first ``count`` coefficients of the quotient of two power series, by the recursion for its inverse."""
    from scipy.signal import lfilter  # type: ignore[import-untyped]

    impulse = np.zeros(count)
    impulse[0] = 1.0
    result: Vector = lfilter(numerator[:count], denominator[:count], impulse)
    return result


def root_coefficients(count: int) -> Vector:
    """The first ``count`` coefficients of (1 - x)^(-1/2), the square root of the partial sums."""
    steps = np.arange(1, count)
    return np.concatenate([[1.0], np.cumprod((2 * steps - 1) / (2 * steps))])


def inverse_root_coefficients(count: int) -> Vector:
    """The first ``count`` coefficients of (1 - x)^(1/2)."""
    steps = np.arange(1, count)
    return np.concatenate([[1.0], np.cumprod((2 * steps - 3) / (2 * steps))])


@dataclass(frozen=True, kw_only=True)
class Toeplitz:
    """C with the first column ``coefficients``, of which those beyond the last one given are 0.

    ``num_steps`` is what the noise is for: it is never guessed from the coefficients, which may be fewer, and not more.
    Raises ``SettingError`` for more, and ``ValueError`` unless the first one is positive.
    """

    num_steps: int
    coefficients: Vector = field(repr=False)

    def __post_init__(self) -> None:
        check_bands(len(self.coefficients), self.num_steps)
        if not self.coefficients[0] > 0:
            raise ValueError(f"the first coefficient is {self.coefficients[0]}, and C would have no inverse")

    @property
    def column(self) -> Vector:
        """``[n]``, the first column of C."""
        return np.concatenate([self.coefficients, np.zeros(self.num_steps - len(self.coefficients))])

    @property
    def inverse_column(self) -> Vector:
        """``[n]``, the first column of the inverse of C."""
        return series(np.ones(1), self.coefficients, self.num_steps)

    def sensitivity(self, participation: Participation) -> float:
        """As ``toeplitz_sensitivity``."""
        return toeplitz_sensitivity(self.column, participation)

    def prefix_variances(self) -> Vector:
        """``[n]``, in units of z."""
        variances: Vector = np.cumsum(np.square(np.cumsum(self.inverse_column)))
        return variances

    def deviations(self) -> Vector:
        """``[n]``, in units of z."""
        deviations: Vector = np.sqrt(np.cumsum(np.square(self.inverse_column)))
        return deviations

    def stream(self) -> Stream:
        """Of the recursion w_t = (z_t - sum_j c_j w_{t-j}) / c_0, which keeps ``bands - 1`` earlier w."""
        first = self.coefficients[0]
        return RingStream(self.num_steps, 1 / first, -self.coefficients[1:] / first, keeps_noise=True)


@dataclass(frozen=True, kw_only=True)
class BandedInverse(Toeplitz):
    """C whose inverse has the first column ``inverse``, of which those beyond the last one given are 0."""

    coefficients: Vector = field(init=False, repr=False)
    inverse: Vector = field(repr=False)

    def __post_init__(self) -> None:
        check_bands(len(self.inverse), self.num_steps)
        object.__setattr__(self, "coefficients", series(np.ones(1), self.inverse, self.num_steps))
        super().__post_init__()

    @property
    def inverse_column(self) -> Vector:
        """``[n]``, the first column of the inverse of C."""
        return np.concatenate([self.inverse, np.zeros(self.num_steps - len(self.inverse))])

    def stream(self) -> Stream:
        """Of w_t = sum_j r_j z_{t-j}, which keeps ``bands - 1`` earlier z."""
        return RingStream(self.num_steps, self.inverse[0], self.inverse[1:], keeps_noise=False)


def independent(num_steps: int) -> Toeplitz:
    """Independent noise: C is the identity."""
    return Toeplitz(num_steps=num_steps, coefficients=np.ones(1))


def bisr(num_steps: int, noise_bands: int) -> BandedInverse:
    """Banded inverse square root: noise of the last ``noise_bands`` draws, without a fit (arXiv 2505.12128)."""
    check_bands(noise_bands, num_steps)
    return BandedInverse(num_steps=num_steps, inverse=inverse_root_coefficients(noise_bands))


NOISE_MECHANISMS = {"bisr": bisr, "independent": independent}


def check_bands(bands: int, num_steps: int) -> None:
    """Raise ``SettingError`` unless ``bands`` are in 1 to ``num_steps``."""
    if not 1 <= bands <= num_steps:
        raise SettingError("noise_bands", bands, f"in 1 to {num_steps}, the number of steps", "lower it, 16 is usual")
