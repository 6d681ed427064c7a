"""The examples of a device, only from the place that its policy names.

=========== =================== =======================================================================
``content`` ``data_source``     ``data_path``
=========== =================== =======================================================================
images      images              a folder with one folder of PNG or JPEG files for each of ``class_names``
images      parquet             a folder of ``*.parquet`` files: struct<bytes, path>, and a class number
table       csv, jsonl, parquet a file, or a folder of files (``fed_dpsat.data.described``)
text        csv, jsonl, parquet the same
text        folder              a folder of files, or one with a folder of files for each class
any         function            ``module:function`` that returns ``Examples`` or a ``Dataset``
=========== =================== =======================================================================

All examples are private. Errors name files and rows, so they go only to the log of the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_dpsat import plugins
from fed_dpsat.data.cache import Arrays, cached, fingerprint
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.decode import decode_images
from fed_dpsat.data.described.tokenizer import digest
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.errors import DataError, SettingError
from fed_dpsat.settings.data import BYTES

IMAGES = (".png", ".jpg", ".jpeg")


@lru_cache(maxsize=1)
def own_data(policy: Policy, run: int = 0, task: str = "") -> Dataset:
    """The examples of the device as a training split, with an empty test split. Raises ``InputError``.

    Labels of a table or of texts are those of ``task``, or of the first one of the policy. A device reads the data once
    per ``run``, so the next run includes changes of the data.
    """
    sources = SOURCES[policy.content] | {"function": _function}
    if policy.data_source not in sources:
        raise DataError(
            f"data_source={policy.data_source!r} is not one of {', '.join(sources)} for content={policy.content!r}; "
            "choose one, or another content"
        )
    return sources[policy.data_source](policy, task or policy.tasks[0])


def check_tokenizer(policy: Policy) -> None:
    """Raise ``PolicyError`` unless the files of the tokenizer are those that the owner of the device has checked."""
    if policy.content != "text" or policy.tokenizer == BYTES or policy.data_source == "function":
        return
    found = digest(policy.tokenizer)
    if found != policy.tokenizer_sha256:
        bound = f"{found}, the SHA-256 of the files of tokenizer={policy.tokenizer!r}"
        remedy = "restore the files, or write this one if you trust them"
        raise PolicyError(str(SettingError("tokenizer_sha256", policy.tokenizer_sha256, bound, remedy)))


def whole(num_examples: int) -> list[np.ndarray]:
    """The partition of a device: one part with all examples."""
    return [np.arange(num_examples)]


def _function(policy: Policy, task: str) -> Dataset:
    made = plugins.build("dataset", policy.data_path, {})
    if isinstance(made, Examples):
        return _dataset(policy, made)
    if not isinstance(made, Dataset):
        raise DataError(f"data_path={policy.data_path!r} returned a {type(made).__name__}, not Examples or a Dataset")
    return _dataset(
        policy,
        made.train,
        class_names=policy.class_names or made.class_names,
        label_scale=made.label_scale,
        declared=made.declared,
        tokenizer=made.tokenizer,
    )


def _described(policy: Policy, task: str) -> Dataset:
    check_tokenizer(policy)
    settings = {
        "data_source": policy.data_source,
        "data_path": policy.data_path,
        "cache_dir": str(Path(policy.folder) / "cache"),
        "input_columns": _by_commas(policy.input_columns),
        "label_column": policy.label_column,
        "class_names": _by_commas(policy.class_names),
        "columns_file": policy.columns_file,
        "tokenizer": policy.tokenizer,
        "max_length": policy.max_length,
        "task": task,
    }
    arguments = ", ".join([*filter(None, [policy.dataset_args]), "all_private = true"])
    made: Dataset = plugins.build("dataset", policy.content, settings, arguments)
    return dataclasses.replace(made, name=policy.dataset)


def _by_commas(names: Sequence[str]) -> str:
    """``names`` as a setting has them, each in quotes."""
    return ", ".join('"' + name.replace('"', '""') + '"' for name in names)


def _images(policy: Policy, task: str) -> Dataset:
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


def _parquet(policy: Policy, task: str) -> Dataset:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    files = sorted(_folder(policy).rglob("*.parquet"))
    return _decoded(policy, files, lambda: [(str(file), pq.read_table(file, partitioning=None)) for file in files])


Source = Callable[[Policy, str], Dataset]
TABLES: dict[str, Source] = dict.fromkeys(("csv", "jsonl", "parquet"), _described)
SOURCES: Mapping[str, dict[str, Source]] = {
    "images": {"images": _images, "parquet": _parquet},
    "table": TABLES,
    "text": TABLES | {"folder": _described},
}
"""By content, what reads each source."""


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
        _image_column(policy): pa.array(images, kind),
        policy.label_column: pa.array([label for _, label in files], pa.int64()),
    }
    return str(root), pa.table(columns)


def _image_column(policy: Policy) -> str:
    return policy.input_columns[0] if policy.input_columns else policy.image_column


def _decoded(policy: Policy, files: list[Path], tables: Callable[[], list[tuple[str, Any]]]) -> Dataset:
    if not files:
        raise DataError(f"data_path={policy.data_path!r} holds no examples; check data_source and class_names")
    channels, height, width = policy.shape
    columns = {"image_column": _image_column(policy), "label_column": policy.label_column}

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


def _dataset(policy: Policy, train: Examples, **declared: Any) -> Dataset:
    fields = {"name": policy.dataset, "class_names": policy.class_names, **declared}
    numbers = isinstance(train.labels, Tensor) and train.labels.dtype == torch.float32
    classes, needs = len(fields["class_names"]), train.labels is not None and not numbers
    if not len(train) or (needs and not classes):
        raise DataError(f"{len(train)} examples of {classes} classes; a device needs at least one each")
    return Dataset(**fields, train=train, test=train.rows(torch.arange(0)))
