#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6
# What: One NaN among nine replies makes `FedMedian` NaN; `FedTrimmedAvg` and `Krum` leave it out.
# A good guess: A median of nine values stands up to four bad ones, of any kind: inf does no harm here.
# Seen: values 0 to 7 and one bad: with inf the median is 4; with NaN it is NaN (trimmed mean 4, Krum 3).
# Why it matters: NaN is what a diverged client sends, and the cheapest attack. The robust strategy hands it to
#   everybody. Drop replies that are not finite before aggregating.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check flwr==1.42.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

logging.disable(logging.CRITICAL)


class Reply:
    """What a strategy reads of a client's message, without a network."""

    class metadata:  # noqa: N801
        src_node_id = 1

    def __init__(self, numbers, examples=1):
        self.content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(np.asarray(numbers))}), "metrics": MetricRecord({"num-examples": examples})}
        )

    def has_error(self):
        return False

    def has_content(self):
        return True


from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum


def aggregate(strategy, bad):
    replies = [Reply(np.full(1, value, np.float32)) for value in [*range(8), bad]]
    return float(strategy.aggregate_train(1, replies)[0]["w"].numpy()[0])


got = {
    "median, inf": aggregate(FedMedian(), np.inf),
    "median, NaN": aggregate(FedMedian(), np.nan),
    "trimmed, NaN": aggregate(FedTrimmedAvg(), np.nan),
    "Krum, NaN": aggregate(Krum(num_malicious_nodes=1), np.nan),
}
print(got)
assert got["median, inf"] == 4 and got["trimmed, NaN"] == 4 and np.isfinite(got["Krum, NaN"])
assert np.isnan(got["median, NaN"])
PY
