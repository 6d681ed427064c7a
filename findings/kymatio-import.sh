#!/usr/bin/env bash
# Packages: kymatio==0.3.0 scipy==1.17.1 numpy==2.4.6 setuptools==80.9.0 appdirs==1.4.4 configparser==7.2.0 packaging==25.0
# What: kymatio's newest release installs beside scipy's newest and cannot be imported, not even its transform of images.
# A good guess: `pip install kymatio` gives a package that imports: it asks for scipy without an upper end.
# Seen: ImportError: cannot import name 'sph_harm' from 'scipy.special', which only the transform of volumes needs.
# Why it matters: The field's library of scattering features needs scipy below 1.17; features=scattering has its numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check kymatio==0.3.0 scipy==1.17.1 numpy==2.4.6 \
  setuptools==80.9.0 appdirs==1.4.4 configparser==7.2.0 packaging==25.0
"$folder/venv/bin/python" -W ignore - <<'PY'
from importlib.metadata import requires

assert "scipy" in (requires("kymatio") or []), "it has a range for scipy now"
try:
    import kymatio.numpy  # noqa: F401
except ImportError as error:
    print("ImportError:", str(error)[:80])
    assert "sph_harm" in str(error)
else:
    raise SystemExit("it can be imported now")
PY
