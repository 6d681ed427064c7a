#!/usr/bin/env bash
# Packages: jax-privacy==2.0.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
# What: `UserSelectionStrategy` over Poisson sampling gives another type and shape for a batch without a user.
# A good guess: Each batch is an integer array [users, examples of a user]; without a user it is [0, 2], and
#   selects no row, as an empty batch of `CyclicPoissonSampling` does.
# Seen: int64 [1, 2] and [2, 2], and float64 [0] if no user is drawn. A float64 array is no index: IndexError.
# Why it matters: Empty batches are a part of Poisson sampling, and their step is charged and noised like any other.
#   A run with user-level sampling ends at the first one, or skips it and is no longer the mechanism it is charged as.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check jax-privacy==2.0.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np
from jax_privacy.batch_selection import CyclicPoissonSampling, UserSelectionStrategy

poisson = CyclicPoissonSampling(sampling_prob=0.1, iterations=40)
empty_of_examples = [b for b in poisson.batch_iterator(6, np.random.default_rng(0)) if not len(b)]
assert all(np.issubdtype(b.dtype, np.integer) for b in empty_of_examples)
users = np.array([0, 0, 0, 1, 1, 2])
batches = list(UserSelectionStrategy(poisson, 2).batch_iterator(users, np.random.default_rng(0)))
forms = {(b.shape, str(b.dtype)) for b in batches}
print(forms)
assert ((1, 2), "int64") in forms
assert ((0,), "float64") in forms
try:
    np.zeros((6, 3))[next(b for b in batches if not len(b))]
except IndexError as error:
    print("IndexError:", error)
else:
    raise SystemExit("an empty batch selects rows now")
PY
