#!/usr/bin/env bash
# Packages: torch==2.13.0
# What: On a CPU, torch.linalg.vector_norm of float32 adds squares one after the other if the dimension is strided, and
#   in few lanes if it is contiguous; square().sum() adds pairwise. A norm of many numbers is off by far more than a sum.
# A good guess: a norm is as exact as a sum, about 1e-7 relative, whatever the strides.
# Seen: for 1,048,576 numbers of 0.1 the norm over a transposed dimension is 7.0e-3 too small; for 0.3 it is 5.8e-3 too
#   large over that one and 4.9e-4 too small over a contiguous one. The root of the summed squares is right to 3e-7.
# Why it matters: A gradient that is clipped by a norm which is too small is longer than the bound by as much. Norms of
#   contiguous blocks of 1024 numbers, added up in float64, are right to 1e-6.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch

torch.set_num_threads(1)


def off(value):
    """Relative errors of three norms of 1,048,576 equal numbers: strided, contiguous, root of the summed squares."""
    columns = torch.full((1 << 20, 8), value)
    exact = columns.double().square().sum(0).sqrt()
    norms = (
        torch.linalg.vector_norm(columns.t(), dim=1),
        torch.linalg.vector_norm(columns.t().contiguous(), dim=1),
        columns.t().square().sum(1).sqrt(),
    )
    return [float(((norm.double() - exact) / exact)[0]) for norm in norms]


small, large = off(0.1), off(0.3)
print("strided, contiguous, summed:", *(f"{e:+.1e}" for e in (*small, *large)))
assert small[0] < -5e-3, small
assert large[0] > 4e-3, large
assert large[1] < -2e-4, large
assert max(abs(small[2]), abs(large[2])) < 1e-6
PY
