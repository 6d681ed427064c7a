#!/usr/bin/env bash
# Packages: diffprivlib==0.6.6 scikit-learn==1.9.1 numpy==2.4.6
# What: diffprivlib's newest release installs beside scikit-learn's newest and cannot be imported, not even its
#   noise mechanisms.
# A good guess: `pip install diffprivlib` gives a package that imports: its range for scikit-learn has no upper end.
# Seen: ImportError: cannot import name 'DOUBLE' from 'sklearn.tree._tree'.
# Why it matters: To compare mechanisms or budgets with it, pin scikit-learn (1.6.1 works).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check diffprivlib==0.6.6 scikit-learn==1.9.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
try:
    import diffprivlib.mechanisms  # noqa: F401
except ImportError as error:
    print("ImportError:", str(error)[:80])
    assert "DOUBLE" in str(error)
else:
    raise SystemExit("it can be imported now")
PY
