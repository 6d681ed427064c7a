#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6 torch==2.13.0
# What: `FedAvg` returns whole numbers as float64, a rounding error below; loading them into a torch module cuts
#   them off.
# A good guess: Three clients whose counter is 7 average to 7 and the module holds 7.
# Seen: the average is 6.999999999999999 in float64; BatchNorm's num_batches_tracked becomes 6.
# Why it matters: Step counters (BatchNorm, a scheduler's, a sampler's) go backwards by one in some rounds. A
#   counter that keys noise or a schedule must not travel with the weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check flwr==1.42.0 numpy==2.4.6 torch==2.13.0
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


import torch
from flwr.serverapp.strategy import FedAvg

average, _ = FedAvg().aggregate_train(1, [Reply(np.array(7)) for _ in range(3)])
value = average["w"].numpy()
norm = torch.nn.BatchNorm1d(2)
norm.load_state_dict({**norm.state_dict(), "num_batches_tracked": average.to_torch_state_dict()["w"]})
print(value, value.dtype, norm.num_batches_tracked)
assert value.dtype == np.float64 and value < 7
assert norm.num_batches_tracked.item() == 6
PY
