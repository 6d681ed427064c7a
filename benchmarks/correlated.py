"""The time of correlated noise beside independent noise: ``python -m benchmarks.correlated [--fit]``.

0.55M coordinates, one thread. Each number is a median over turns in which all contestants draw one step, so a busy
machine slows all equally. Streams are warm: rings are full and buffers are there. ``--fit`` also times the fits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fed_dpsat.step.correlated.banded import band_mf
from fed_dpsat.step.correlated.base import Factorization
from fed_dpsat.step.correlated.blt import blt
from fed_dpsat.step.correlated.sensitivity import Participation
from fed_dpsat.step.correlated.toeplitz import bisr
from fed_dpsat.step.correlated.tree import Tree
from fed_dpsat.step.noise import derive_generator, standard_normals

STEPS, TURNS, WARM = 1000, 45, 20
ONCE = Participation(num_steps=STEPS, most=1, min_separation=STEPS)
INDEPENDENT = "independent"
NOISES: dict[str, Callable[[], Factorization]] = {
    "band-mf, 16 bands": lambda: band_mf(STEPS, 16),
    "band-mf, 64 bands": lambda: band_mf(STEPS, 64),
    "blt, 4 buffers": lambda: blt(ONCE, 4),
    "bisr, 16 bands": lambda: bisr(STEPS, 16),
    "tree": lambda: Tree(num_steps=STEPS),
}


def contestants(size: int) -> dict[str, Callable[[], Tensor]]:
    """The noise of the next step, by name; a draw of independent normals comes first."""
    generator = derive_generator(0, purpose="noise")

    def draw() -> Tensor:
        return standard_normals(generator, size)

    def of(factorization: Factorization) -> Callable[[], Tensor]:
        stream = factorization.stream()
        return lambda: stream.next(draw, stream.taken + 1)

    return {INDEPENDENT: draw, **{name: of(make()) for name, make in NOISES.items()}}


def medians(size: int, turns: int = TURNS, warm: int = WARM) -> dict[str, float]:
    """Median seconds of a step, by name."""
    made, seconds = contestants(size), dict[str, list[float]]()
    for turn in range(warm + turns):
        for name, noise in made.items():
            started = time.perf_counter()
            noise()
            if turn >= warm:
                seconds.setdefault(name, []).append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def fits() -> dict[str, float]:
    """Seconds of one fit, by name."""
    ten = {n: Participation(num_steps=n, most=10, min_separation=n // 10) for n in (1000, 10_000)}
    made: dict[str, Callable[[], object]] = {
        "band-mf, 16 bands, 1000 steps": lambda: band_mf(1000, 16),
        "blt, 4 buffers, 1000 steps": lambda: blt(ten[1000], 4),
        "band-mf, 16 bands, 10000 steps": lambda: band_mf(10_000, 16),
        "blt, 4 buffers, 10000 steps": lambda: blt(ten[10_000], 4),
        "bisr, 16 bands, 10000 steps": lambda: bisr(10_000, 16).sensitivity(ten[10_000]),
    }
    found = {}
    for name, make in made.items():
        started = time.perf_counter()
        make()
        found[name] = time.perf_counter() - started
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=550_570)
    parser.add_argument("--fit", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = medians(chosen.size)
    for name, seconds in found.items():
        print(f"| {name} | {1000 * seconds:.2f} | {seconds / found[INDEPENDENT]:.2f} |")
    for name, seconds in fits().items() if chosen.fit else ():
        print(f"| {name} | {seconds:.2f} s |")


if __name__ == "__main__":
    main()
