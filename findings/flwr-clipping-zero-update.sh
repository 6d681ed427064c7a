#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6
# What: The clipping of differential privacy, of the server's wrappers and the clients' mods alike, divides by the
#   update's norm and raises for an update of zero.
# A good guess: An update of zero is within every bound: it stays zero, and the other clients' updates are averaged
#   with it.
# Seen: two clients, one with an update of 1e-30: an average. One that returns the arrays it got: ZeroDivisionError in
#   the server's aggregation, which ends the run.
# Why it matters: A client without examples, with a learning rate of 0 at the end of a schedule, or with an empty
#   batch returns what it got. The error tells everybody that a client of this round learnt nothing, and that is not
#   covered by the noise.
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



old = {"weights": np.zeros(3)}
average = aggregate(old, {"weights": np.full(3, 0.1)}, {"weights": np.full(3, 1e-30)})["weights"]
print(average)
assert np.allclose(average, 0.05)
try:
    aggregate(old, {"weights": np.full(3, 0.1)}, {"weights": np.zeros(3)})
except ZeroDivisionError as error:
    print("ZeroDivisionError:", error)
else:
    raise SystemExit("an update of zero is taken")
PY
