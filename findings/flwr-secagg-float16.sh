#!/usr/bin/env bash
# Packages: flwr==1.42.0 numpy==2.4.6
# What: The quantisation of secure aggregation overflows for float16: x + 3 times 699,051 is beyond 65,504, and
#   infinity becomes the smallest int32.
# A good guess: The clip range is +-3 and the target range 2^22, the defaults: each value comes back within 1e-3, or
#   half precision is refused.
# Seen: 0.5, -0.25, 1.0 and 2.5 come back as -3075 each. float32 and float64: within 1e-5.
# Why it matters: -3075 is a thousand times the clip range, and under the masks nobody can see which client sent it.
#   Convert to float32 before quantising.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check flwr==1.42.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np
from flwr.common.secure_aggregation.quantization import dequantize, quantize

np.random.seed(0)
error = {}
for dtype in (np.float64, np.float32, np.float16):
    values = np.array([0.5, -0.25, 1.0, 2.5], dtype)
    with np.errstate(all="ignore"):
        back = dequantize(quantize([values], 3.0, 2**22), 3.0, 2**22)[0]
    print(dtype.__name__, back)
    error[dtype.__name__] = float(np.abs(back - values).max())
assert error["float64"] < 1e-5 and error["float32"] < 1e-5
assert error["float16"] > 1000
PY
