#!/usr/bin/env bash
# Packages: jax-privacy==2.0.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
# What: `toeplitz.per_query_error(noising_coef=..., n=1000)` ignores n: four coefficients give four errors.
# A good guess: Coefficients beyond the last are zero, as with `strategy_coef`, and there is an error for each of the
#   1,000 prefix sums: RMSE 7.07 for the four first coefficients of the inverse square root.
# Seen: 4 errors, RMSE 1.13. By the strategy coefficients of the same mechanism: 1,000 errors, RMSE 7.07.
# Why it matters: Banded inverses look six times better than they are, and better than the optimum over all
#   mechanisms: a search by this error chooses the fewest coefficients.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check jax-privacy==2.0.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_ENABLE_X64=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import jax.numpy as jnp
import numpy as np
from jax_privacy.matrix_factorization import toeplitz

n, inverse = 1000, [1.0]
for j in range(1, 4):
    inverse.append(inverse[-1] * (2 * j - 3) / (2 * j))
# A float64 loop: the error of prefix sum t is the squared norm of row t of A C^-1.
row = np.cumsum(np.pad(inverse, (0, n - 4)))
by_hand = np.cumsum(row**2)

short = np.asarray(toeplitz.per_query_error(noising_coef=jnp.array(inverse), n=n))
strategy = toeplitz.inverse_coef(jnp.pad(jnp.array(inverse), (0, n - 4)), n)
whole = np.asarray(toeplitz.per_query_error(strategy_coef=strategy, n=n))
print(short.shape, short.mean() ** 0.5, whole.shape, whole.mean() ** 0.5)
np.testing.assert_allclose(whole, by_hand, rtol=1e-9)
assert short.shape == (4,)
assert abs(short.mean() ** 0.5 - 1.13235) < 1e-4
PY
