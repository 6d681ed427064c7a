"""The part of the mechanisms' suite that looks at noise: its size, its shape, and that it is never used twice."""

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
    """``make(noise_multiplier=, clip_norm=, expected_batch_size=)`` and the loop that calls what it makes."""

    make: Callable[..., Any]
    train: TrainLoop


def noise_has_the_declared_size(subject: Subject) -> None:
    """Noise on the SUM is N(0, (noise_multiplier clip_norm)^2); 0.9 and 1.1 of it are told apart (chi-square)."""
    for case in CASES:
        _check_noise(_residual(subject, case, 0.0), f"{_words(case)}, a sum of zeros")


def noise_is_added_to_the_sum(subject: Subject) -> None:
    """The sum is still there below the noise, and the noise does not depend on it."""
    for case in CASES:
        _check_noise(_residual(subject, case, 1000.0), f"{_words(case)}, a sum with a norm of 1000 clip_norm")


def noise_is_fresh_for_every_stream(subject: Subject) -> None:
    """Two steps, clients, rounds or attempts share no noise, and it all comes from the generator that is given."""
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
            remedy="draw from the generator that privatize is given: not from torch's, and not from one of your own",
        )


def noise_is_fresh_for_every_coordinate(subject: Subject) -> None:
    """No two coordinates share noise: neither within a tensor, at any distance, nor between two of one shape."""
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
    """A mechanism; everything is 1 unless said."""
    return subject.make(noise_multiplier=noise_multiplier, clip_norm=clip_norm, expected_batch_size=expected_batch_size)


def stream() -> np.random.Generator:
    """The noise of client 0 in round 1, from its start."""
    return derive_generator(0, purpose="noise", client=0, round=1)


def _released(mechanism: Any, total: Params, generator: np.random.Generator) -> Params:
    torch.manual_seed(0)  # whoever draws from torch's generator draws the same again, and is found
    return {n: t.double().flatten() for n, t in mechanism.privatize(total, generator).items()}


def _noise(mechanism: Any, generator: np.random.Generator) -> Draws:
    private = _released(mechanism, filled(SHAPES), generator)
    return np.concatenate([t.numpy() for t in private.values()])


def _residual(subject: Subject, case: tuple[float, float, float], ratio: float) -> dict[str, Draws]:
    """What is left per tensor of a result when the mean is taken off, in standard deviations of the noise."""
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
        remedy="an event of kind poisson_gaussian is a promise of Gaussian noise",
    )
    require(
        residual["scale"].item() != 0,
        expected="noise on a tensor of shape [] too",
        seen=f"none ({case})",
        remedy="add noise to every tensor of the sum",
    )


def _words(case: tuple[float, float, float]) -> str:
    return "noise_multiplier={:g}, clip_norm={:g}, expected_batch_size={:g}".format(*case)
