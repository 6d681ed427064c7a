#!/usr/bin/env bash
# Packages: datasets==4.8.5 numpy==2.4.6
# What: `Dataset.class_encode_column` of a column of integers sorts them as texts: class 10 comes before class 2, and
#   the numbers of the labels change.
# A good guess: Integers stay what they are, or are numbered in numeric order: 0 to 11 are encoded as 0 to 11.
# Seen: labels 0 to 11: 2 becomes 4, 9 becomes 11, 10 becomes 2 and 11 becomes 3. Labels 0 to 9 stay as they are.
# Why it matters: Stratified splits ask for a ClassLabel column, and this is the call that makes one. Clients that
#   encode their own data get numbers that depend on the classes that they have: 2 is class 2 on one client and class
#   10 on the next, and the average model learns from both. Use cast_column with a ClassLabel of names that all
#   clients share.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check datasets==4.8.5 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
from datasets import Dataset, disable_progress_bars

disable_progress_bars()
encoded = {}
for classes in (10, 12):
    data = Dataset.from_dict({"label": list(range(classes))}).class_encode_column("label")
    encoded[classes] = list(data["label"])
    print(classes, encoded[classes], data.features["label"].names)
assert encoded[10] == list(range(10))
assert encoded[12] == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]
PY
