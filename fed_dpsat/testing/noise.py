"""The checks of noise in the suite of mechanisms: its size, its distribution, and its independence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fed_dpsat.params import Params
from fed_dpsat.step.noise import derive_generator
from fed_dpsat.testing import statistics
from fed_dpsat.testing.conformance import require
from fed_dpsat.testing.problems import TrainLoop, filled
from fed_dpsat.testing.statistics import Draws

SHAPES = {"w": (100, 100), "b": (100, 100), "scale": ()}
CASES = ((1.0, 1.0, 1.0), (0.5, 0.1, 64.0), (4.0, 10.0, 3.0))
"""``noise_multiplier, clip_norm, expected_batch_size``."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The factory ``make(noise_multiplier=, clip_norm=, expected_batch_size=)`` and the training loop."""

    make: Callable[..., Any]
    train: TrainLoop


def noise_has_the_declared_size(subject: Subject) -> None:
    """Noise on the SUM is N(0, (noise_multiplier clip_norm)^2); the chi-square test rejects 0.9 and 1.1 of it."""
    for case in CASES:
        _check_noise(_residual(subject, case, 0.0), f"{_words(case)}, a sum of zeros")


def noise_is_added_to_the_sum(subject: Subject) -> None:
    """The result contains the sum, and the noise does not depend on the sum."""
    for case in CASES:
        _check_noise(_residual(subject, case, 1000.0), f"{_words(case)}, a sum with a norm of 1000 clip_norm")


def noise_is_fresh_for_every_stream(subject: Subject) -> None:
    """The noise of two steps, clients, rounds or attempts is independent, and comes from the given generator."""
    mechanism = make(subject)
    first = stream()
    draws = {"a step": _noise(mechanism, first), "the step after it": _noise(mechanism, first)}
    for what, generator in (
        ("another client", derive_generator(0, purpose="noise", client=1, round=1)),
        ("another round", derive_generator(0, purpose="noise", client=0, round=2)),
        ("another attempt", derive_generator(0, purpose="noise", client=0, round=1, attempt=1)),
    ):
        draws[what] = _noise(mechanism, generator)
    for (a, x), (b, y) in itertools.combinations(draws.items(), 2):
        shared = statistics.correlation(x, y)
        require(
            abs(shared) < 5,
            expected=f"independent noise for {a} and {b}",
            seen=f"a correlation of {shared / math.sqrt(len(x)):.3g}",
            remedy="draw from the generator argument of privatize: not from torch, and not from your own generator",
        )


def noise_is_fresh_for_every_coordinate(subject: Subject) -> None:
    """The noise of any two coordinates is independent: within a tensor and between tensors of one shape."""
    draws = _noise(make(subject), stream())
    largest = statistics.largest_autocorrelation(draws)
    require(
        largest < 6.5,
        expected="independent noise for every coordinate",
        seen=f"an autocorrelation of {largest / math.sqrt(len(draws)):.3g}",
        remedy="draw one normal for each coordinate of each tensor",
    )


def make(
    subject: Subject, noise_multiplier: float = 1.0, clip_norm: float = 1.0, expected_batch_size: float = 1.0
) -> Any:
    """A mechanism; each argument is 1 by default."""
    return subject.make(noise_multiplier=noise_multiplier, clip_norm=clip_norm, expected_batch_size=expected_batch_size)


def stream() -> np.random.Generator:
    """A new generator for the noise of client 0 in round 1."""
    return derive_generator(0, purpose="noise", client=0, round=1)


def _released(mechanism: Any, total: Params, generator: np.random.Generator) -> Params:
    torch.manual_seed(0)  # a mechanism that draws from torch repeats its noise, which the checks find
    return {n: t.double().flatten() for n, t in mechanism.privatize(total, generator).items()}


def _noise(mechanism: Any, generator: np.random.Generator) -> Draws:
    private = _released(mechanism, filled(SHAPES), generator)
    return np.concatenate([t.numpy() for t in private.values()])


def _residual(subject: Subject, case: tuple[float, float, float], ratio: float) -> dict[str, Draws]:
    """The result minus the mean per tensor, in standard deviations of the noise."""
    noise_multiplier, clip_norm, batch = case
    value = ratio * clip_norm / math.sqrt(sum(torch.Size(s).numel() for s in SHAPES.values()))
    total = filled(SHAPES, value)
    private = _released(make(subject, *case), total, stream())
    scale = noise_multiplier * clip_norm
    return {n: ((p * batch - total[n].double().flatten()) / scale).numpy() for n, p in private.items()}


def _check_noise(residual: dict[str, Draws], case: str) -> None:
    for name in ("w", "b"):
        z = residual[name]
        low, high = statistics.variance_bounds(len(z))
        square = float(np.square(z).mean())
        require(
            low < square < high,
            expected="noise on the sum with a standard deviation of noise_multiplier * clip_norm",
            seen=f"{math.sqrt(square):.4g} times that in {name} ({case})",
            remedy="result = (sum + noise) / expected_batch_size, with noise on every coordinate of every tensor",
        )
    z = np.concatenate([residual["w"], residual["b"]])
    distance = statistics.kolmogorov_distance(z)
    require(
        distance < 2.5 and len(z) >= statistics.SMALLEST,
        expected="normal noise of mean 0",
        seen=f"a Kolmogorov-Smirnov distance of {distance:.3g} / sqrt(n), mean {z.mean():.3g} ({case})",
        remedy="add Gaussian noise: an event of kind poisson_gaussian declares it",
    )
    require(
        residual["scale"].item() != 0,
        expected="noise on a tensor of shape [] too",
        seen=f"none ({case})",
        remedy="add noise to every tensor of the sum",
    )


def _words(case: tuple[float, float, float]) -> str:
    return "noise_multiplier={:g}, clip_norm={:g}, expected_batch_size={:g}".format(*case)
