#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6
# What: The norm by which the wrappers and mods for differential privacy clip an update counts all arrays of the
#   record, BatchNorm's num_batches_tracked too.
# A good guess: The norm is that of the floating-point parameters. An update of norm 0.17 is not clipped by
#   clipping_norm = 1.
# Seen: three weights move by 0.1 in 100 local steps. Without the counter the average moves by 0.1, with it by 0.001;
#   with 1,000 local steps by 0.0001.
# Why it matters: `ArrayRecord(model.state_dict())` is what Flower's examples send, and it holds a counter for each
#   BatchNorm layer. The more steps a client takes, the less its weights move, and the noise drowns the rest. Leave
#   the counters out of the record.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check flwr==1.42.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

logging.disable(logging.CRITICAL)


class Reply:
    """What a strategy reads of a client's message, without a network."""

    class metadata:  # noqa: N801
        src_node_id = 1

    def __init__(self, arrays, **metrics):
        self.content = RecordDict({"arrays": record(arrays), "metrics": MetricRecord({"num-examples": 1, **metrics})})

    def has_error(self):
        return False

    def has_content(self):
        return True


def record(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def aggregate(old, *new):
    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(), noise_multiplier=0.0, clipping_norm=1.0, num_sampled_clients=len(new)
    )
    strategy.current_arrays = record(old)
    arrays, _ = strategy.aggregate_train(1, [Reply(reply) for reply in new])
    return {name: array.numpy() for name, array in arrays.items()}



weights = np.zeros(3, np.float32)
moved = {}
for steps in (None, 100, 1000):
    old, new = {"weights": weights}, {"weights": weights + np.float32(0.1)}
    if steps is not None:
        old["num_batches_tracked"], new["num_batches_tracked"] = np.array(0), np.array(steps)
    moved[steps] = float(aggregate(old, new, new)["weights"][0])
print(moved)
for steps, expected in ((None, 0.1), (100, 1e-3), (1000, 1e-4)):
    assert abs(moved[steps] / expected - 1) < 1e-3
PY
