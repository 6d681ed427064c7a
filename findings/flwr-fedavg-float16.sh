#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6
# What: `FedAvg` multiplies and adds in the arrays' own type: in float16 the running sum of many small parts stops
#   growing.
# A good guess: The average of identical models is that model, to the precision of the type (1e-3).
# Seen: float16, every client sends 1: 1,000 clients give 0.979, 4,096 give 0.5, 10,000 give 0.25. float32: 1.000.
# Why it matters: Half-precision messages are the first thing one tries at scale; the global model shrinks every
#   round and nothing fails.
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


from flwr.serverapp.strategy import FedAvg

got = {}
for dtype in (np.float16, np.float32):
    for clients in (1000, 4096, 10000):
        average, _ = FedAvg().aggregate_train(1, [Reply(np.ones(1, dtype)) for _ in range(clients)])
        got[dtype.__name__, clients] = float(average["w"].numpy()[0])
print(got)
assert all(abs(got["float32", n] - 1) < 1e-3 for n in (1000, 4096, 10000))
assert got["float16", 1000] < 0.99 and got["float16", 4096] == 0.5 and got["float16", 10000] == 0.25
PY
