"""Time of statistics over many clients: ``python -m benchmarks.statistics [--clients N] [--rows N] [--columns N]``.

The data are made up in memory: what is timed is everything but their reading. Best of three.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

from fed_dpsat.settings.config import RunConfig
from fed_dpsat.statistics import make
from fed_dpsat.statistics.rows import Declared, Rows


def made_up(clients: int, rows: int, columns: int) -> tuple[list[Declared], Rows]:
    """``rows`` rows of each client with normal numbers and ten classes."""
    generator, total = np.random.default_rng(0), clients * rows
    names = [f"x{i}" for i in range(columns)]
    values = {name: generator.normal(0, 1, total) for name in names}
    made = Rows(
        client=np.repeat(np.arange(clients), rows),
        num_clients=clients,
        values=values,
        labels=generator.integers(0, 10, total),
        class_names=tuple(map(str, range(10))),
    )
    return [Declared(name=n, low=-3.0, high=3.0, log=False, spec={"low": -3, "high": 3}) for n in names], made


def main() -> None:
    """Print seconds by privacy unit and source of noise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--columns", type=int, default=10)
    args = parser.parse_args()
    columns, rows = made_up(args.clients, args.rows, args.columns)
    print(f"{args.clients} clients of {args.rows} rows, {args.columns} columns, moments, quantiles and labels")
    for unit in ("example", "client"):
        for source in ("seeded", "system"):
            config = RunConfig(
                privacy_unit=unit,
                noise_source=source,
                num_clients=args.clients,
                statistics="moments, quantiles, labels",
                statistics_epsilon=5.0,
                target_epsilon=8.0,
            )
            seconds = []
            for _ in range(3):
                with (
                    tempfile.TemporaryDirectory() as folder,
                    mock.patch.object(make, "declared_columns", return_value=columns),
                    mock.patch.object(make, "rows_of", return_value=rows),
                ):
                    began = time.perf_counter()
                    make.make_statistics(config, Path(folder) / "statistics")
                    seconds.append(time.perf_counter() - began)
            print(f"unit {unit:8} noise {source:7} {min(seconds):.2f} s")


if __name__ == "__main__":
    main()
