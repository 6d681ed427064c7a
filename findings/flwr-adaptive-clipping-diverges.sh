#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6
# What: `DifferentialPrivacyServerSideAdaptiveClipping` moves its bound the wrong way: the rule of Andrew et al.
#   (1905.03871) wants the share of updates that are NOT clipped, and the strategy puts in the share that are. More
#   clipping lowers the bound, which clips more.
# A good guess: The bound goes to the median of the updates' norms from both sides.
# Seen: 50 updates with norms from 0.5 to 1.5 (median 1), no noise, 200 rounds: from 0.9 the bound falls below 1e-6,
#   from 1.1 it grows beyond 1e6.
# Why it matters: A bound near zero throws the training away; one that grows without end means no clipping, and
#   noise that grows with it. Use fixed clipping.
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


from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg

norms = np.linspace(0.5, 1.5, 50)
end = {}
for start in (0.9, 1.1):
    strategy = DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(), noise_multiplier=0.0, num_sampled_clients=50, initial_clipping_norm=start, target_clipped_quantile=0.5
    )
    strategy.current_arrays = ArrayRecord({"w": Array(np.zeros(1))})
    for number in range(200):
        strategy.aggregate_train(number + 1, [Reply([norm]) for norm in norms])
    end[start] = strategy.clipping_norm
print(end)
assert end[0.9] < 1e-6
assert end[1.1] > 1e6
PY
