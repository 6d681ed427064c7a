#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6
# What: `DifferentialPrivacyServerSideFixedClipping` without its accountant adds noise for an influence of
#   clipping_norm / num_sampled_clients on the average, but averages by num-examples: a client with many examples
#   has an influence near clipping_norm.
# A good guess: Averages under differential privacy are uniform, or the noise is for the largest weight.
# Seen: 10 clients, clipping_norm 1: a client with as many examples as the others moves the average by 0.1, one with
#   100 times as many by 0.92. Noise is for 0.1 in both.
# Why it matters: Sizes of clients differ by such factors in every Dirichlet partition. The effective noise
#   multiplier is 9 times smaller than the one that is charged. Send equal weights.
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


from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

moved = {}
for examples in (1, 100):
    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(), noise_multiplier=1e-9, clipping_norm=1.0, num_sampled_clients=10
    )
    strategy.current_arrays = ArrayRecord({"w": Array(np.zeros(2))})
    others = [Reply([0.0, 1e-9]) for _ in range(9)]
    average, _ = strategy.aggregate_train(1, [Reply([5.0, 0.0], examples), *others])
    moved[examples] = float(average["w"].numpy()[0])
print(moved)
assert abs(moved[1] - 0.1) < 1e-6
assert abs(moved[100] - 100 / 109) < 1e-6
PY
