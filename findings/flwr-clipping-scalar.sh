#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6
# What: The clipping of differential privacy, of the server's wrappers and the clients' mods alike, leaves a parameter
#   without dimensions as it is: the difference of two such arrays is a numpy scalar, and multiplying a scalar in
#   place changes a copy.
# A good guess: The whole update is clipped to clipping_norm = 1, whatever the shapes of its arrays: a scalar is
#   clipped like an array of one number.
# Seen: three weights move by 1 and a temperature by 1,000. With the shape (1,) the temperature's clipped update is
#   0.999998; with the shape () it is 1,000. The weights are 0.001 in both.
# Why it matters: Temperatures, the logit scale of CLIP, and ReZero gates are such parameters. The noise is for an
#   influence of 1, so the epsilon does not hold for a model that has one. Give such a parameter the shape (1,).
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
for shape in ((1,), ()):
    old = {"weights": weights, "temperature": np.zeros(shape, np.float32)}
    new = {"weights": weights + 1, "temperature": np.full(shape, 1000, np.float32)}
    average = aggregate(old, new, new)
    moved[shape] = float(average["weights"][0]), float(average["temperature"].item())
print(moved)
assert abs(moved[(1,)][1] - 1) < 1e-4
assert moved[()][1] == 1000
assert all(abs(weight - 1e-3) < 1e-5 for weight, _ in moved.values())
PY
