#!/usr/bin/env bash
# Packages: dp-accounting==0.6.0 numpy==2.4.6
# What: The PLD of one Laplace mechanism has infinite epsilon at delta = 0, while that of a sampled one is finite.
# A good guess: Laplace noise of multiplier 1 is pure 1-DP: epsilon 1 at every delta, 0 included; sampling can only
#   lower it.
# Seen: unsampled: 1.0 at delta 1e-5, inf at delta 0 (a mass of 1e-15 is cut off as infinite). Sampled with
#   probability 0.01: 0.0171 at delta 0.
# Why it matters: A pure guarantee is why one takes Laplace noise, and a calibration or a sweep over delta that ends
#   at 0 finds none. Quote pure epsilon by the closed form, 1 / multiplier.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check dp-accounting==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import math

import dp_accounting
from dp_accounting.pld import PLDAccountant


def epsilon(event, delta):
    return float(PLDAccountant().compose(event).get_epsilon(delta))


laplace = dp_accounting.LaplaceDpEvent(1.0)
sampled = dp_accounting.PoissonSampledDpEvent(0.01, laplace)
got = {"1e-5": epsilon(laplace, 1e-5), "0": epsilon(laplace, 0.0), "sampled, 0": epsilon(sampled, 0.0)}
print(got)
assert abs(got["1e-5"] - 1) < 1e-3
assert math.isinf(got["0"])
assert abs(got["sampled, 0"] - 0.0171) < 1e-3
PY
