#!/usr/bin/env bash
# Packages: jax-privacy==2.0.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
# What: `toeplitz.minsep_sensitivity_squared(coef, min_sep, max_participations)` takes the number of coefficients
#   for the number of steps if n is left out.
# A good guess: The coefficients are the bands of a matrix of any size, and ten participations 100 steps apart are ten:
#   the squared sensitivity of bands shorter than the separation is ten times that of one participation.
# Seen: 1.5 without n, 15.0 with n=1000: one participation is counted where there are ten.
# Why it matters: Noise scaled to it is 3.2 times too small, and epsilon 1 at delta 1e-6 is 3.5 in truth.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check jax-privacy==2.0.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_ENABLE_X64=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import dp_accounting
import jax.numpy as jnp
import numpy as np
from dp_accounting.pld import PLDAccountant
from jax_privacy.matrix_factorization import toeplitz

bands, n, apart, times = [1.0, 0.5, 0.4, 0.3], 1000, 100, 10
found = {
    size: float(toeplitz.minsep_sensitivity_squared(jnp.array(bands), apart, max_participations=times, n=size))
    for size in (None, n)
}
column = np.zeros(n)
for k in range(times):
    column[k * apart : k * apart + 4] += bands
print(found, "by hand", column @ column)
assert abs(found[n] - column @ column) < 1e-9
assert abs(found[None] - 1.5) < 1e-9
honest = 4.224679 * (found[None] / found[n]) ** 0.5
epsilon = PLDAccountant().compose(dp_accounting.GaussianDpEvent(honest)).get_epsilon(1e-6)
print("epsilon", epsilon)
assert epsilon > 3.5
PY
