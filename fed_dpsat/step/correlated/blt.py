"""Buffered linear Toeplitz (BLT): a rational C with few poles, whose noise needs as many buffers (arXiv 2404.16706).

C(x) = prod_j (1 - theta'_j x) / (1 - theta_j x), so c_0 = 1 and c_i = sum_j omega_j theta_j^(i-1). The fit for many
participations is that of arXiv 2408.08868: it minimises the logarithm of the mean squared error of partial sums. Here
1 > theta_1 > theta'_1 > theta_2 > ... > 0 by construction, as products of sigmoids. Then every omega is positive and
their sum is below 1, so c is not negative and does not increase, and the sensitivity is exact. Gradients follow from
dC / dtheta_j = C x / (1 - theta_j x).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fed_dpsat.errors import SettingError
from fed_dpsat.step.correlated.base import Stream
from fed_dpsat.step.correlated.sensitivity import Participation, Vector
from fed_dpsat.step.correlated.streams import BufferStream
from fed_dpsat.step.correlated.toeplitz import Toeplitz

DEAD = 1e-8
"""A buffer whose omega is below this does nothing."""
MOST_BUFFERS = 8


@dataclass(frozen=True, kw_only=True)
class BufferedToeplitz(Toeplitz):
    """C with c_0 = 1 and c_i = sum_j omega_j theta_j^(i-1)."""

    coefficients: Vector = field(init=False, repr=False)
    theta: Vector
    omega: Vector

    def __post_init__(self) -> None:
        powers = np.power(self.theta[:, None], np.arange(self.num_steps - 1)[None])
        object.__setattr__(self, "coefficients", np.concatenate([[1.0], self.omega @ powers]))
        super().__post_init__()

    def stream(self) -> Stream:
        """Of w_t = z_t - sum_j omega_j S_j, then S_j <- theta_j S_j + w_t: as many models as buffers."""
        return BufferStream(self.num_steps, self.theta, self.omega)


def blt(participation: Participation, noise_buffers: int) -> BufferedToeplitz:
    """Buffered linear Toeplitz: fitted noise that cancels over all steps; keeps ``noise_buffers`` models.

    There are fewer buffers if one of them would do nothing.
    """
    from scipy.optimize import minimize  # type: ignore[import-untyped]

    if not 1 <= noise_buffers <= MOST_BUFFERS:
        bound = f"in 1 to {MOST_BUFFERS}"
        raise SettingError("noise_buffers", noise_buffers, bound, "3 or 4 are enough for thousands of steps")

    def loss(free: Vector) -> tuple[float, Vector]:
        return _loss(free, participation)

    start = _start(participation.num_steps, noise_buffers)
    fitted = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-12})
    free = fitted.x if fitted.fun < loss(start)[0] else start
    omega = _omega(*_poles(free))
    if noise_buffers > 1 and float(omega.min()) < DEAD:
        return blt(participation, noise_buffers - 1)
    return BufferedToeplitz(num_steps=participation.num_steps, theta=_poles(free)[0], omega=omega)


NOISE_MECHANISMS = {"blt": blt}


def _start(num_steps: int, buffers: int) -> Vector:
    """Distances to 1 in geometric progression, as the best rational functions near (1 - x)^(-1/2) have them."""
    distances = np.geomspace(min(0.1, 0.5 / num_steps), 0.8, 2 * buffers)
    values = 1 - distances
    ratios = values / np.concatenate([[1.0], values[:-1]])
    start: Vector = np.log(ratios) - np.log1p(-ratios)
    return start


def _poles(free: Vector) -> tuple[Vector, Vector]:
    """theta and theta' of the free parameters, which alternate and fall."""
    values: Vector = np.cumprod(_sigmoid(free), dtype=np.float64)
    return values[0::2], values[1::2]


def _sigmoid(free: Vector) -> Vector:
    result: Vector = 0.5 * (1 + np.tanh(free / 2))
    return result


def _omega(theta: Vector, inverse_theta: Vector) -> Vector:
    """The residues of C; with alternating poles none is negative."""
    differences = theta[:, None] - theta[None]
    np.fill_diagonal(differences, 1.0)
    omega: Vector = np.prod(theta[:, None] - inverse_theta[None], axis=1) / np.prod(differences, axis=1)
    return omega


def _loss(free: Vector, participation: Participation) -> tuple[float, Vector]:
    """The logarithm of the mean squared error under ``participation``, and its gradient."""
    from scipy.signal import lfilter  # type: ignore[import-untyped]

    n, (theta, inverse_theta) = participation.num_steps, _poles(free)
    c = np.zeros(n)
    c[0] = 1.0
    b = np.ones(n)
    for pole, zero in zip(theta, inverse_theta, strict=True):
        c = lfilter([1.0, -zero], [1.0, -pole], c)
        b = lfilter([1.0, -pole], [1.0, -zero], b)
    shifted = participation.sum_of_shifts(c)
    square = float(shifted @ shifted)
    weights = np.arange(n, 0, -1) / n
    error = float(weights @ np.square(b))
    of_square, of_error = participation.sum_of_earlier(shifted) / square, weights * b / error

    def slope(value: float, sign: float) -> float:
        moved = lfilter([0.0, 1.0], [1.0, -value], np.stack([c, b]), axis=1)
        return 2 * sign * float(of_square @ moved[0] - of_error @ moved[1])

    slopes = np.empty(len(free))
    slopes[0::2] = [slope(value, 1.0) for value in theta]
    slopes[1::2] = [slope(value, -1.0) for value in inverse_theta]
    values, ratios = np.cumprod(_sigmoid(free)), _sigmoid(free)
    # value_m is the product of the ratios up to m, and a ratio has the slope ratio (1 - ratio) in its parameter.
    of_ratios = np.cumsum((slopes * values)[::-1])[::-1] * (1 - ratios)
    return float(np.log(square) + np.log(error)), of_ratios
