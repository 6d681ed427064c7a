#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6 torch==2.13.0
# What: `FedAdam` takes BatchNorm's running statistics for parameters: a variance that falls moves by about eta = 0.1
#   a round, below zero.
# A good guess: The server's optimizer steps on parameters, and running statistics are averaged as in FedAvg. Or it
#   steps on all arrays, and a variance stays positive, because each client sends a positive one.
# Seen: features of variance 0.01, four clients that send what torch's rule gives after five batches: under FedAvg the
#   running variance goes to 0.01 and stays. Under FedAdam with its defaults it is negative after 12 rounds, and the
#   model's outputs are NaN.
# Why it matters: Each reply is finite and no step fails; the global model is NaN, and in evaluation mode only. Use
#   GroupNorm, or keep the buffers out of the record.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check flwr==1.42.0 numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg
from torch import nn

logging.disable(logging.CRITICAL)


class Reply:
    """What a strategy reads of a client's message, without a network."""

    class metadata:  # noqa: N801
        src_node_id = 1

    def __init__(self, arrays):
        self.content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})

    def has_error(self):
        return False

    def has_content(self):
        return True


def train(arrays, generator):
    model = nn.BatchNorm1d(8)
    model.load_state_dict(arrays.to_torch_state_dict())
    for _ in range(5):
        model(0.1 * torch.randn(64, 8, generator=generator))
    return ArrayRecord(model.state_dict())


smallest, outputs = {}, {}
for strategy in (FedAvg(), FedAdam()):
    generator = torch.Generator().manual_seed(0)
    model = nn.BatchNorm1d(8)
    arrays = ArrayRecord(model.state_dict())
    name = type(strategy).__name__
    smallest[name] = []
    for server_round in range(1, 15):
        strategy.current_arrays = {key: array.numpy() for key, array in arrays.items()}
        arrays, _ = strategy.aggregate_train(server_round, [Reply(train(arrays, generator)) for _ in range(4)])
        smallest[name].append(float(arrays["running_var"].numpy().min()))
        if smallest[name][-1] < 0:
            break
    model.load_state_dict(arrays.to_torch_state_dict())
    outputs[name] = model.eval()(0.1 * torch.randn(4, 8, generator=generator))
print({name: np.round(values, 4).tolist() for name, values in smallest.items()})
assert smallest["FedAvg"][-1] > 0.005 and outputs["FedAvg"].isfinite().all()
assert smallest["FedAdam"][-1] < 0 and outputs["FedAdam"].isnan().any()
PY
