"""Charges of many clients: ``python -m benchmarks.ledger [--rounds N] [--clients N] [--cohort N] [--events N]``.

Each round charges a random cohort, settles it and asks for epsilon, as a run does; ``--events`` is the number of
distinct events in a cohort. Then the file is opened, which verifies it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.accounting import PrivacyEvent, PrivacyLedger, epsilon


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 60), ("clients", 1_000_000), ("cohort", 16_667), ("events", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    events = [PrivacyEvent(noise_multiplier=1.0, sample_rate=0.05, steps=1 + i) for i in range(asked.events)]
    draw, spent = np.random.default_rng(0), {name: np.zeros(2) for name in ("charge", "settle", "epsilon")}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "ledger.sqlite"
        epsilon(events, 1e-5)  # imports dp_accounting
        with PrivacyLedger(path) as ledger:
            for round in range(1, asked.rounds + 1):
                cohort = np.sort(draw.choice(asked.clients, asked.cohort, replace=False)).tolist()
                charges = {client: events[client % len(events)] for client in cohort}
                outcomes = {client: "dropped: late" if client % 100 == 0 else "released" for client in cohort}
                spent["charge"] += seconds(partial(ledger.charge_many, round, 0, charges))
                spent["settle"] += seconds(partial(ledger.settle_many, round, 0, outcomes))
                spent["epsilon"] += seconds(partial(ledger.epsilon, 1e-5))
            charged = ledger.head.charges
        opened = seconds(lambda: PrivacyLedger(path).close())
        size = path.stat().st_size
    total = np.sum(list(spent.values()), axis=0) / charged * 1e6
    parts = ", ".join(f"{name} {one[0] / charged * 1e6:.2f}" for name, one in spent.items())
    print(
        f"{charged:,} charges in {asked.rounds} rounds, {asked.events} event(s): {total[0]:.2f} us a charge ({parts}), "
        f"{total[1]:.2f} of the processor; {size / charged:.1f} bytes a charge; {opened[0]:.2f} s to open and verify, "
        f"{opened[1]:.2f} of the processor"
    )


def seconds(work: Callable[[], object]) -> NDArray[np.float64]:
    """Seconds of one call [2]: of the clock, and of the processor."""
    start = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - start


if __name__ == "__main__":
    main()
