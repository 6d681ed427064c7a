"""Epsilon of many clients: ``python -m benchmarks.accounting [--json]``.

Ten thousand clients with a hundred distinct histories, and a million with ten: seconds of the first computation, and of
the next one, when a hundred (ten) histories have grown by a round and the rest of the work is looking them up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

from fed_dpsat.accounting import PrivacyEvent, epsilons

CASES = ((10_000, 100), (1_000_000, 10))


def histories(clients: int, distinct: int) -> list[tuple[PrivacyEvent, ...]]:
    """One history per client, ``distinct`` different ones: noise and number of steps differ."""
    kinds = [
        (PrivacyEvent(noise_multiplier=0.8 + 0.01 * (kind % 10), sample_rate=0.05, steps=40 + kind),)
        for kind in range(distinct)
    ]
    return [kinds[client % distinct] for client in range(clients)]


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    rows = []
    for clients, distinct in CASES:
        every = histories(clients, distinct)
        first = seconds(lambda every=every: epsilons(every, 1e-5))
        again = statistics.median(seconds(lambda every=every: epsilons(every, 1e-5)) for _ in range(5))
        rows.append({"clients": clients, "histories": distinct, "first_seconds": first, "median_seconds": again})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"{row['clients']:>9,} clients, {row['histories']:>3} histories: first {row['first_seconds']:.2f} s, "
            f"then {row['median_seconds']:.3f} s"
        )


if __name__ == "__main__":
    main()
