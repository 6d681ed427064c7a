#!/usr/bin/env bash
# Packages: jax-privacy==2.0.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
# What: `clip_pytree` takes the norm in the gradient's own type: a float16 gradient longer than 256 has norm
#   infinity and is clipped to zero. In bfloat16 the clipped gradient is longer than clip_norm.
# A good guess: A gradient of norm 520 is clipped to length 1 in every type, and never beyond clip_norm.
# Seen: float32 norm 520 to 1.000; float16 norm inf to 0; bfloat16 norm 520 to 1.0013.
# Why it matters: The hardest examples drop out of the sum silently, where they should weigh most; and the bound
#   that the noise is for is exceeded by 0.13 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check jax-privacy==2.0.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import jax.numpy as jnp
import numpy as np
from jax_privacy.clipping import clip_pytree

length = {}
for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
    clipped, norm = clip_pytree({"w": jnp.full(3, 300.0, dtype)}, clip_norm=1.0)
    length[dtype.__name__] = float(np.linalg.norm(np.asarray(clipped["w"], np.float64)))
    print(dtype.__name__, "norm", float(norm), "clipped", length[dtype.__name__])
assert abs(length["float32"] - 1) < 1e-5
assert length["float16"] == 0
assert 1.001 < length["bfloat16"] < 1.002
PY
