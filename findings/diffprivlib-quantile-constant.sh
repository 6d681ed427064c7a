#!/usr/bin/env bash
# Packages: diffprivlib==0.6.6 scikit-learn==1.6.1 numpy==2.4.6
# What: `tools.median` raises if all values are equal; the intervals between equal values have length zero and the
#   probabilities become NaN.
# A good guess: Equal values are ordinary data (a clipped column, an unchanged sensor): the median is near the
#   value, as for values that are almost equal.
# Seen: 1,000 times 0.5 in bounds (0, 1): RuntimeError, Can't find a candidate to return. 1,000 different values: a
#   number.
# Why it matters: A private summary of clients' norms or losses fails for the clients whose data are constant, and
#   the failure tells who they are: an error is a release too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check diffprivlib==0.6.6 scikit-learn==1.6.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np
from diffprivlib import tools

spread = tools.median(np.linspace(0, 1, 1000), epsilon=10.0, bounds=(0, 1), random_state=0)
print(spread)
assert 0.4 < spread < 0.6
try:
    with np.errstate(all="ignore"):
        tools.median(np.full(1000, 0.5), epsilon=10.0, bounds=(0, 1), random_state=0)
except RuntimeError as error:
    print("RuntimeError:", str(error)[:60])
else:
    raise SystemExit("a median of equal values is found now")
PY
