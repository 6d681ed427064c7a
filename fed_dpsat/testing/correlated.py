"""Conformance of correlated noise: a linear, causal function of one draw per step, and a bound that holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fed_dpsat.plugins import PluginError
from fed_dpsat.step.correlated.base import StreamError
from fed_dpsat.step.correlated.measured import Measured
from fed_dpsat.step.correlated.sensitivity import Participation
from fed_dpsat.testing.conformance import require, run_checks

STEPS, COORDINATES = 9, 5
PATTERNS = ((1, 9), (3, 3), (2, 4), (3, 1))
"""Largest number of participations, and the least distance."""
Make = Callable[[int], Any]


def check_noise(factory: Make) -> list[str]:
    """Run the suite on ``num_steps -> mechanism`` with ``stream()``; returns the names of the checks.

    A mechanism that states a ``sensitivity`` is held to all patterns of participation. Raises ``ConformanceError``.
    """
    return run_checks("noise", CHECKS, factory)


def worst_pattern(matrix: NDArray[np.float64], participation: Participation) -> float:
    """The largest norm of a signed sum of the columns of C, over all patterns and signs: exact for one coordinate."""
    worst = 0.0
    for size in range(1, participation.most + 1):
        for steps in itertools.combinations(range(participation.num_steps), size):
            gaps, apart = np.diff(steps), participation.min_separation
            if (gaps < apart).any() or (participation.fixed_order and (gaps > apart).any()):
                continue
            for signs in itertools.product([1, -1], repeat=size - 1):
                worst = max(worst, float(np.linalg.norm(matrix[:, steps] @ np.array([1, *signs]))))
    return worst


def noise_is_a_matrix_of_its_draws(make: Make) -> None:
    """One draw a step; the noise is linear in the draws, has that of its step, and none of a later one."""
    try:
        Measured.of(make(STEPS), STEPS)
    except PluginError as error:
        require(False, expected="noise C^-1 z", seen=str(error), remedy="w_t = (z_t - sum_j C[t, j] w_j) / C[t, t]")


def noise_is_the_same_matrix_in_each_coordinate(make: Make) -> None:
    """Each coordinate has the noise of its own draws, in their type, whatever the other coordinates are."""
    inverse, stream = Measured.of(make(STEPS), STEPS).inverse, make(STEPS).stream()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        stream = make(STEPS).stream()
        draws = torch.from_numpy(np.random.default_rng(0).normal(size=(STEPS, COORDINATES))).to(dtype)
        noise = [stream.next(draws[step - 1].clone, step) for step in range(1, STEPS + 1)]
        require(
            all(one.dtype == dtype and one.shape == (COORDINATES,) for one in noise),
            expected=f"{COORDINATES} numbers of {dtype} at each step",
            seen=", ".join(sorted({f"{tuple(one.shape)} of {one.dtype}" for one in noise})),
            remedy="return noise in the type and the shape of the draw",
        )
        wrong = float(np.abs(torch.stack(noise).double().numpy() - inverse @ draws.double().numpy()).max())
        require(
            wrong < tolerance,
            expected="in each coordinate the same matrix of the draws",
            seen=f"numbers that are off by {wrong:.3g}",
            remedy="do the same to each coordinate, and nothing with two of them",
        )


def streams_share_nothing(make: Make) -> None:
    """A second stream of one mechanism begins anew, also while the first is under way."""
    mechanism = make(STEPS)
    streams, seen = [mechanism.stream(), mechanism.stream()], list[list[float]]()
    for step in range(1, STEPS + 1):
        seen.append([float(stream.next(lambda s=step: torch.tensor([1.0 / s]), step)) for stream in streams])
    require(
        all(first == second for first, second in seen),
        expected="equal noise of two streams for equal draws",
        seen=f"{seen[-1][0]:.4g} and {seen[-1][1]:.4g} at the last step",
        remedy="keep the state in the stream, and not in the mechanism or the module",
    )


def a_stream_gives_each_step_once(make: Make) -> None:
    """A step out of turn, or beyond the last one, raises ``StreamError`` before it draws."""
    stream, drawn = make(STEPS).stream(), list[int]()

    def draw() -> torch.Tensor:
        drawn.append(1)
        return torch.ones(2)

    for step in (2, *range(1, STEPS + 1), 1, STEPS + 1):
        before, in_turn = len(drawn), step == stream.taken + 1 <= STEPS
        try:
            stream.next(draw, step)
            refused = False
        except StreamError:
            refused = len(drawn) == before
        require(
            refused != in_turn,
            expected=f"step {step} {'given' if in_turn else 'refused without a draw'} after step {stream.taken}",
            seen="the opposite",
            remedy="subclass fed_dpsat.step.correlated.base.Stream and override _next alone",
        )


def its_sensitivity_holds_for_all_patterns(make: Make) -> None:
    """The stated sensitivity, if any, is at least that of each pattern of participation, with any signs."""
    mechanism = make(STEPS)
    if not hasattr(mechanism, "sensitivity"):
        return
    matrix = np.linalg.inv(Measured.of(mechanism, STEPS).inverse).astype(np.float64)
    for most, apart in PATTERNS:
        participation = Participation(num_steps=STEPS, most=most, min_separation=apart)
        stated, worst = mechanism.sensitivity(participation), worst_pattern(matrix, participation)
        require(
            stated >= worst * (1 - 1e-9),
            expected=f"a sensitivity of at least {worst:.4f} for {most} participations, {apart} apart",
            seen=f"{stated:.4f}",
            remedy="leave sensitivity away: a run measures the matrix, and bounds it",
        )


CHECKS: tuple[Callable[[Make], None], ...] = (
    noise_is_a_matrix_of_its_draws,
    noise_is_the_same_matrix_in_each_coordinate,
    streams_share_nothing,
    a_stream_gives_each_step_once,
    its_sensitivity_holds_for_all_patterns,
)
