#!/usr/bin/env bash
# Packages: flwr-datasets==0.6.0 datasets==4.8.5 numpy==2.4.6
# What: `IidPartitioner` cuts the rows in order: on a data set that is sorted by label its parts have one or two
#   classes. The shuffle is in FederatedDataset, not in the partitioner.
# A good guess: `each partition sampled randomly from the dataset`, says its docstring: all ten classes in every
#   part.
# Seen: 1,000 rows sorted by label, 10 parts: 1 or 2 classes a part. Shuffled first: 10.
# Why it matters: A data set of one's own is handed to the partitioner directly, and class folders are read in
#   order. The IID baseline of an experiment is then its worst non-IID case.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check flwr-datasets==0.6.0 datasets==4.8.5 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import datasets
from flwr_datasets.partitioner import IidPartitioner

datasets.disable_progress_bars()
rows = datasets.Dataset.from_dict({"label": [number // 100 for number in range(1000)]})
classes = {}
for name, data in (("sorted", rows), ("shuffled", rows.shuffle(seed=0))):
    partitioner = IidPartitioner(num_partitions=10)
    partitioner.dataset = data
    classes[name] = [len(set(partitioner.load_partition(part)["label"])) for part in range(10)]
print(classes)
assert max(classes["sorted"]) <= 2
assert min(classes["shuffled"]) == 10
PY
