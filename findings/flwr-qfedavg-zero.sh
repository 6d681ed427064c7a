#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6
# What: `QFedAvg(q=0)` averages clients equally and does not read num-examples.
# A good guess: `When set to 0, q-FedAvg is equivalent to FedAvg`, says its docstring: the same arrays as FedAvg with
#   the same replies.
# Seen: a client with 1 example sends 4, one with 3 examples sends 0: FedAvg gives 1, QFedAvg with q = 0 gives 2.
# Why it matters: A sweep over q takes q = 0 for its baseline. With clients of different sizes the step from FedAvg to
#   q = 0 is already a reweighting, and is then credited to fairness. Compare q with QFedAvg(q=0), and report FedAvg
#   next to it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check flwr==1.42.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, QFedAvg

logging.disable(logging.CRITICAL)


class Reply:
    """What a strategy reads of a client's message, without a network."""

    class metadata:  # noqa: N801
        src_node_id = 1

    def __init__(self, arrays, **metrics):
        self.content = RecordDict({"arrays": record(arrays), "metrics": MetricRecord(metrics)})

    def has_error(self):
        return False

    def has_content(self):
        return True


def record(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


got = {}
for strategy in (FedAvg(), QFedAvg(client_learning_rate=0.1, q=0.0)):
    strategy.current_arrays = record({"weights": np.zeros(1)})
    replies = [
        Reply({"weights": np.full(1, value)}, **{"num-examples": examples, "train_loss": 0.5})
        for value, examples in ((4.0, 1), (0.0, 3))
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    got[type(strategy).__name__] = float(arrays["weights"].numpy()[0])
print(got)
assert abs(got["FedAvg"] - 1) < 1e-9
assert abs(got["QFedAvg"] - 2) < 1e-9
PY
