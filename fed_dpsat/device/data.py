"""The examples of a device, only from the place that its policy names.

=============== =======================================================================================
``data_source`` ``data_path``
=============== =======================================================================================
images          a folder with one folder per class, named as in ``class_names``; PNG or JPEG files in it
parquet         a folder of ``*.parquet`` files: ``image_column`` struct<bytes, path>, ``label_column`` int
function        ``module:function`` or ``file.py:function`` that returns ``Examples`` or a ``Dataset``
=============== =======================================================================================

All examples are private. Errors name files and rows, so they go only to the log of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fed_dpsat import plugins
from fed_dpsat.data.cache import Arrays, cached, fingerprint
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.decode import decode_images
from fed_dpsat.device.policy import Policy
from fed_dpsat.errors import DataError

IMAGES = (".png", ".jpg", ".jpeg")


@lru_cache(maxsize=1)
def own_data(policy: Policy, run: int = 0) -> Dataset:
    """The examples of the device as a training split, with an empty test split. Raises ``DataError``.

    A device reads them once per ``run``, so the next run includes changes of the data.
    """
    if policy.data_source not in SOURCES:
        raise DataError(f"data_source={policy.data_source!r} is not one of {', '.join(SOURCES)}; choose one")
    return SOURCES[policy.data_source](policy)


def whole(num_examples: int) -> list[np.ndarray]:
    """The partition of a device: one part with all examples."""
    return [np.arange(num_examples)]


def _function(policy: Policy) -> Dataset:
    made = plugins.build("dataset", policy.data_path, {})
    train = made.train if isinstance(made, Dataset) else made
    if not isinstance(train, Examples):
        raise DataError(f"data_path={policy.data_path!r} returned a {type(made).__name__}, not Examples or a Dataset")
    return _dataset(policy, train)


def _images(policy: Policy) -> Dataset:
    root = _folder(policy)
    strange = sorted(item.name for item in root.iterdir() if item.is_dir() and item.name not in policy.class_names)
    if strange:
        raise DataError(f"{root / strange[0]} is not one of class_names; rename it, or name the class in the policy")
    files = [
        (file, label)
        for label, name in enumerate(policy.class_names)
        for file in sorted((root / name).glob("*"))
        if file.suffix.lower() in IMAGES
    ]
    return _decoded(policy, [file for file, _ in files], lambda: [_as_table(policy, root, files)])


def _parquet(policy: Policy) -> Dataset:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    files = sorted(_folder(policy).rglob("*.parquet"))
    return _decoded(policy, files, lambda: [(str(file), pq.read_table(file, partitioning=None)) for file in files])


SOURCES: dict[str, Callable[[Policy], Dataset]] = {"images": _images, "parquet": _parquet, "function": _function}


def _folder(policy: Policy) -> Path:
    root = Path(policy.data_path)
    if not root.is_dir():
        raise DataError(f"data_path={policy.data_path!r} is not a folder; correct the policy")
    if len(policy.shape) != 3 or not policy.class_names:
        raise DataError(
            f"shape={policy.shape}, class_names={policy.class_names}: set [channels, height, width] and all classes"
        )
    return root


def _as_table(policy: Policy, root: Path, files: list[tuple[Path, int]]) -> tuple[str, Any]:
    import pyarrow as pa

    images = [{"bytes": file.read_bytes(), "path": file.name} for file, _ in files]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        policy.image_column: pa.array(images, kind),
        policy.label_column: pa.array([label for _, label in files], pa.int64()),
    }
    return str(root), pa.table(columns)


def _decoded(policy: Policy, files: list[Path], tables: Callable[[], list[tuple[str, Any]]]) -> Dataset:
    if not files:
        raise DataError(f"data_path={policy.data_path!r} holds no examples; check data_source and class_names")
    channels, height, width = policy.shape
    columns = {"image_column": policy.image_column, "label_column": policy.label_column}

    def decode() -> Arrays:
        inputs, labels = decode_images(
            tables(), **columns, shape=(channels, height, width), num_classes=len(policy.class_names)
        )
        return {"inputs": inputs, "labels": labels}

    asked = {"data_source": policy.data_source, "shape": policy.shape, "class_names": policy.class_names, **columns}
    key = fingerprint(asked, files)
    arrays = cached(Path(policy.folder) / "cache" / f"{policy.dataset}-{key}", decode)
    mean, std = policy.mean or (0.5,) * channels, policy.std or (0.5,) * channels
    return _dataset(policy, Examples(inputs=arrays["inputs"], labels=arrays["labels"], mean=mean, std=std))


def _dataset(policy: Policy, train: Examples) -> Dataset:
    if not len(train) or not policy.class_names:
        raise DataError(f"{len(train)} examples of {len(policy.class_names)} classes; a device needs at least one each")
    return Dataset(name=policy.dataset, train=train, test=train.rows(torch.arange(0)), class_names=policy.class_names)
