"""Time and memory of reading many short texts: ``python -m benchmarks.texts [--rows N] [--tokenizer FOLDER]``.

Each row of the table is a process of its own. "cold" tokenizes and writes the cache, "warm" maps it and takes a batch.
Memory is the largest of the process, and the part of it that no file backs, both above what the imports take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

SOURCES = ("csv", "jsonl", "parquet")


def write_texts(folder: Path, source: str, rows: int) -> None:
    """``rows`` texts of 20 to 400 bytes in a train file, and a thousandth of them in a test file."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    generator = np.random.default_rng(0)
    words = np.array(["".join(generator.choice(list("etaoinshrdlu"), size)) for size in generator.integers(2, 9, 5000)])
    folder.mkdir()
    for split, count in (("train", rows), ("test", rows // 1000)):
        lengths = generator.integers(20, 401, count)
        long = " ".join(generator.choice(words, 200_000))
        starts = generator.integers(0, len(long) - 400, count)
        texts = [long[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        table = pa.table({"text": texts, "label": generator.integers(0, 2, count)})
        if source == "csv":
            pyarrow.csv.write_csv(table, folder / f"{split}.csv")
        elif source == "parquet":
            pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
        else:
            with (folder / f"{split}.jsonl").open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())


def measure(source: str, folder: str, tokenizer: str) -> dict[str, float]:
    """Seconds and MB of one load and a batch of 64, in this process."""
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet  # noqa: F401

    from fed_dpsat import plugins

    plugins.builtin("dataset")
    before, began = _anonymous(), time.perf_counter()
    largest = _peak()
    settings = {"data_source": source, "data_path": f"{folder}/{source}", "cache_dir": f"{folder}/cache"}
    settings |= {"label_column": "label", "class_names": "0,1", "tokenizer": tokenizer}
    data = plugins.build("dataset", "text", {**settings, "max_length": 128})
    data.train.batch(torch.randperm(len(data.train))[:64])
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": _peak() - largest, "private": _anonymous() - before}


def _peak() -> float:
    return _megabytes("/proc/self/status", "VmHWM")  # that of this program; getrusage has that of its parent


def _anonymous() -> float:
    return _megabytes("/proc/self/smaps_rollup", "Anonymous")


def _megabytes(file: str, name: str) -> float:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Print one row of a table for each process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure, given.tokenizer)))
        return
    print("| source | tokenizer | start | seconds | peak MB | private MB |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for source in given.sources.split(","):
            write_texts(Path(folder) / source, source, given.rows)
            for start in ("cold", "warm"):
                command = [sys.executable, "-m", "benchmarks.texts", "--tokenizer", given.tokenizer]
                done = subprocess.run([*command, "--measure", source, folder], check=True, capture_output=True)
                found = json.loads(done.stdout)
                numbers = f"{found['seconds']:.1f} | {found['peak']:.0f} | {found['private']:.0f}"
                print(f"| {source} | {Path(given.tokenizer).name} | {start} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
