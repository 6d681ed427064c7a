"""Small data sets on disk, laid out as the Hub and torchvision lay out theirs."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fed_dpsat.data.sources import ImageSource

Arrays = dict[str, np.ndarray]
ROWS = {"train": 7, "test": 3}


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """``encode(pixels[C, H, W], format)``: an image file in memory."""

    def encode(pixels: np.ndarray, format: str = "PNG") -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, format)
        return file.getvalue()

    return encode


@pytest.fixture
def random_arrays() -> Callable[[ImageSource], Arrays]:
    """Random images and labels for a source: 7 train rows, 3 test rows."""

    def random_arrays(source: ImageSource) -> Arrays:
        rng = np.random.default_rng(0)
        arrays = {}
        for split, rows in ROWS.items():
            arrays[f"{split}_inputs"] = rng.integers(0, 256, (rows, *source.shape), dtype=np.uint8)
            arrays[f"{split}_labels"] = rng.integers(0, len(source.class_names), rows)
        return arrays

    return random_arrays


@pytest.fixture
def write_parquet(encode, random_arrays) -> Callable[..., Arrays]:
    """``write_parquet(source, folder)``: Hub-style Parquet, the train split in two files; returns the arrays."""

    def write(source: ImageSource, folder: Path) -> Arrays:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = random_arrays(source)
        for split, borders in (("train", [0, 4, 7]), ("test", [0, 3])):
            for i, (start, end) in enumerate(itertools.pairwise(borders)):
                images = [{"bytes": encode(pixels), "path": None} for pixels in arrays[f"{split}_inputs"][start:end]]
                labels = arrays[f"{split}_labels"][start:end]
                column = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
                pq.write_table(
                    pa.table({source.image_column: column, source.label_column: labels}),
                    folder / f"{split}-{i:05d}-of-{len(borders) - 1:05d}.parquet",
                )
        return arrays

    return write


@pytest.fixture
def write_idx(random_arrays) -> Callable[..., Arrays]:
    """``write_idx(source, root)``: MNIST's file format in a torchvision root; returns the arrays."""

    def write(source: ImageSource, root: Path) -> Arrays:
        arrays = random_arrays(source)
        raw = root / source.torchvision_class / "raw"
        raw.mkdir(parents=True)
        for split, prefix in (("train", "train"), ("test", "t10k")):
            for array, name in (
                (arrays[f"{split}_inputs"][:, 0], "images-idx3"),
                (arrays[f"{split}_labels"].astype(np.uint8), "labels-idx1"),
            ):
                header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
                (raw / f"{prefix}-{name}-ubyte").write_bytes(header + array.tobytes())
        return arrays

    return write


@pytest.fixture
def write_cifar(random_arrays, monkeypatch) -> Callable[..., Arrays]:
    """``write_cifar(source, root)``: CIFAR's pickles, for a torchvision that no longer checks their MD5."""

    def write(source: ImageSource, root: Path) -> Arrays:
        from fed_dpsat.data._torchvision import torchvision_datasets

        arrays = random_arrays(source)
        dataset_class = getattr(torchvision_datasets(), source.torchvision_class)
        folder = root / dataset_class.base_folder
        folder.mkdir(parents=True)
        label_key = "labels" if source.name == "cifar10" else "fine_labels"
        for split in ("train", "test"):
            names = [name for name, _ in getattr(dataset_class, f"{split}_list")]
            monkeypatch.setattr(dataset_class, f"{split}_list", [[name, None] for name in names])
            for name, rows in zip(names, np.array_split(np.arange(ROWS[split]), len(names)), strict=True):
                batch = {
                    "data": arrays[f"{split}_inputs"][rows].reshape(len(rows), -1),
                    label_key: arrays[f"{split}_labels"][rows].tolist(),
                }
                (folder / name).write_bytes(pickle.dumps(batch))
        meta = dataset_class.meta
        monkeypatch.setattr(dataset_class, "meta", meta | {"md5": None})
        (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: list(source.class_names)}))
        return arrays

    return write


@pytest.fixture
def assert_holds() -> Callable[..., None]:
    """``assert_holds(dataset, arrays)``: both splits hold these pixels and labels."""

    def check(dataset, arrays: Arrays) -> None:
        for split in ("train", "test"):
            examples = getattr(dataset, split)
            np.testing.assert_array_equal(examples.inputs.numpy(), arrays[f"{split}_inputs"])
            np.testing.assert_array_equal(examples.labels.numpy(), arrays[f"{split}_labels"])

    return check
