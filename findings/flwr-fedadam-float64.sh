#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6
# What: `FedAdam` and `QFedAvg` return float64 arrays for float32 replies, because one factor is a numpy float64;
#   `FedYogi`, `FedAdagrad`, `FedAvgM` and the robust strategies keep float32.
# A good guess: All strategies return the type of the replies, as FedAvg does.
# Seen: float32 replies of 1,000 numbers (4,000 bytes): FedAvg, FedAvgM, FedYogi, FedAdagrad, FedMedian and
#   FedTrimmedAvg return 4,000 bytes of numbers, FedAdam and QFedAvg 8,000.
# Why it matters: From the second round on, the server sends twice the bytes to each client, and a saved model is
#   twice as large. A module that takes the arrays as they are (load_state_dict with assign=True) becomes float64 and
#   fails at the first float32 input. Convert after aggregation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check flwr==1.42.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, FedYogi, QFedAvg

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


bytes_of = {}
for strategy in (
    FedAvg(),
    FedAvgM(server_momentum=0.9),
    FedYogi(),
    FedAdagrad(),
    FedMedian(),
    FedTrimmedAvg(),
    FedAdam(),
    QFedAvg(client_learning_rate=0.1),
):
    old = {"weights": np.ones(1000, np.float32)}
    strategy.current_arrays = old if isinstance(strategy, (FedAdam, FedYogi, FedAdagrad)) else record(old)
    replies = [Reply({"weights": np.full(1000, value, np.float32)}, train_loss=0.5) for value in (1, 2, 3)]
    arrays, _ = strategy.aggregate_train(1, replies)
    bytes_of[type(strategy).__name__] = arrays["weights"].numpy().nbytes
print(bytes_of)
assert bytes_of.pop("FedAdam") == bytes_of.pop("QFedAvg") == 8000
assert set(bytes_of.values()) == {4000}
PY
