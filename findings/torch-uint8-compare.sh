#!/usr/bin/env bash
# Packages: torch==2.13.0
# What: A uint8 tensor, such as the bytes of a text, is compared with a number outside [0, 255].
# A good guess: the comparison is of numbers, as in numpy and Python, or an error says that the number does not fit.
# Seen: the number is taken modulo 256 first. For 5 and 200, x >= 256 is True, x < 256 is False, x == 261 is True for 5,
#   and x > -1 is False. A 0-d tensor of int64 in place of the number does the same.
# Why it matters: A check that tokens are below the size of a vocabulary refuses valid bytes if the size is 256 or more,
#   and a check against a negative bound finds nothing. Widen the tensor first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy
import torch

x = torch.tensor([5, 200], dtype=torch.uint8)
seen = {
    "x >= 256": (x >= 256).tolist(),
    "x < 256": (x < 256).tolist(),
    "x == 261": (x == 261).tolist(),
    "x > -1": (x > -1).tolist(),
    "x >= tensor(256)": (x >= torch.tensor(256)).tolist(),
}
print(seen)
assert seen == {
    "x >= 256": [True, True],
    "x < 256": [False, False],
    "x == 261": [True, False],
    "x > -1": [False, False],
    "x >= tensor(256)": [True, True],
}
assert (numpy.array([5, 200], dtype=numpy.uint8) < 256).all()
assert (x.long() < 256).all()
PY
