"""Speed of features: the scattering transform beside kymatio's, and a round on features beside a bare loop.

    pip install --no-deps --target kymatio-env kymatio==0.3.0 appdirs configparser
    python -m benchmarks.features --kymatio kymatio-env

One thread. Contestants take turns in one process, and each figure is the median of processor time, which other programs
on the machine disturb less than they disturb the clock. ``features.md`` has the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.rounds_loop import loop
from fed_dpsat import RunConfig, simulate
from fed_dpsat.data import scattering
from fed_dpsat.data.dataset import Dataset, Examples

TURNS, IMAGES, ROUNDS, EXAMPLES = 7, 256, 6, 20_000


def by_kymatio(folder: str, side: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The transform of kymatio 0.3.0 in ``folder``; it imports a function that scipy 1.17 no longer has."""
    import scipy.special

    sys.path.append(folder)
    scipy.special.sph_harm = None
    from kymatio.torch import Scattering2D

    transform = Scattering2D(2, (side, side), L=8)
    return lambda x: transform(x).flatten(1, 2)


def transforms(kymatio: str) -> None:
    """Images a second and the largest difference, for the sizes of Fashion-MNIST and CIFAR-10."""
    print("| images | kymatio 0.3.0 | ours | ratio | without a compiler | ratio | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for channels, side in ((1, 28), (3, 32)):
        x = torch.rand(IMAGES, channels, side, side)
        compiled = scattering.Scattering()
        contestants = {"kymatio": by_kymatio(kymatio, side), "ours": compiled, "torch": without_compiler}
        found = {name: one(x) for name, one in contestants.items()}
        apart = max(float((found["kymatio"] - found[name]).abs().max()) for name in ("ours", "torch"))
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(TURNS):
            for name, one in contestants.items():
                began = time.process_time()
                one(x)
                times[name].append(time.process_time() - began)
        speed = {name: IMAGES / statistics.median(seconds) for name, seconds in times.items()}
        ratios = {name: statistics.median(np.divide(times["kymatio"], times[name])) for name in ("ours", "torch")}
        print(
            f"| {channels}x{side}x{side} | {speed['kymatio']:.0f}/s | {speed['ours']:.0f}/s | {ratios['ours']:.1f} "
            f"| {speed['torch']:.0f}/s | {ratios['torch']:.1f} | {apart:.1g} |",
            flush=True,
        )


def without_compiler(x: torch.Tensor) -> torch.Tensor:
    """Our transform by torch's functions alone."""
    bank = scattering._bank(*x.shape[2:], 2, 8, x.device)
    kept, bank.compiled = bank.compiled, False
    try:
        return scattering.Scattering()(x)
    finally:
        bank.compiled = kept


def made_up() -> Dataset:
    """Images of noise."""
    generator = np.random.default_rng(0)
    train, test = (
        Examples(
            inputs=torch.from_numpy(generator.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)),
            labels=torch.from_numpy(generator.integers(0, 10, count)),
            mean=(0.0,),
            std=(1.0,),
        )
        for count in (EXAMPLES, 10)
    )
    return Dataset(name="made-up", train=train, test=test, class_names=tuple("0123456789"))


def rounds() -> None:
    """Processor time of a round of ``simulate`` on features, and of the bare loop over the same arrays."""
    print("\n| clients | steps | ours, s a round | bare loop, s a round | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = RunConfig(
            dataset=f"{__file__}:made_up",
            features="scattering",
            features_norm="group",
            cache_dir=folder,
            model="linear",
            optimizer="dp-sgd",
            num_rounds=ROUNDS,
            noise_multiplier=4.0,
            clip_norm=0.1,
            physical_batch_size=1024,
            evaluate_every=10**6,
        )
        for clients, steps in ((1, 10), (10, 5)):
            config = dataclasses.replace(base, num_clients=clients, local_steps=steps, sample_rate=0.2)
            turns = []
            for turn in range(TURNS):
                ours = _seconds(partial(_simulate, config, Path(folder) / f"{clients}-{turn}"))
                turns.append((statistics.median(ours), statistics.median(_seconds(partial(loop, config)))))
            a, b = (statistics.median(times) for times in zip(*turns, strict=True))
            ratio = statistics.median(a / b for a, b in turns)
            print(f"| {clients} | {steps} | {a:.3f} | {b:.3f} | {ratio:.3f} |", flush=True)


def _simulate(config: RunConfig, out: Path, tick: Callable[[], None]) -> None:
    simulate(config, out, on_round=lambda _: tick(), progress=False)


def _seconds(run: Callable[[Callable[[], None]], object]) -> list[float]:
    """Processor time between ticks, without the first round, which loads and compiles."""
    ticks: list[float] = []
    run(lambda: ticks.append(time.process_time()))
    return np.diff(ticks).tolist()[1:-1]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kymatio", help="folder with kymatio 0.3.0; without it the transforms are left out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.kymatio:
        transforms(given.kymatio)
    rounds()


if __name__ == "__main__":
    main()
