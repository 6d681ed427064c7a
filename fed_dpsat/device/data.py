"""The examples of a device, only from the place that its policy names.

=========== =================== =======================================================================
``content`` ``data_source``     ``data_path``
=========== =================== =======================================================================
images      folder              a folder with one folder of PNG or JPEG files for each of ``class_names``
images      parquet             a file, or a folder of files: struct<bytes, path>, and a class
table       csv, jsonl, parquet a file, or a folder of files (``fed_dpsat.data.described``)
text        csv, jsonl, parquet the same
text        folder              a folder of files, or one with a folder of files for each class
any         function            ``module:function`` that returns ``Examples`` or a ``Dataset``
=========== =================== =======================================================================

All examples are private. Errors name files and rows, so they go only to the log of the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_dpsat import plugins
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.described.tokenizer import digest
from fed_dpsat.data.persons import persons_of
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.errors import DataError, SettingError
from fed_dpsat.settings.data import BYTES


@lru_cache(maxsize=1)
def own_data(policy: Policy, run: int = 0, task: str = "") -> Dataset:
    """The examples of the device as a training split, with an empty test split. Raises ``InputError``.

    Labels of a table or of texts are those of ``task``, or of the first one of the policy. A device reads the data once
    per ``run``, so the next run includes changes of the data.
    """
    read = _function if policy.data_source == "function" else _described
    return read(policy, task or policy.tasks[0])


def size(policy: Policy, run: int = 0, task: str = "") -> int:
    """How many examples the device has, or persons if those are its unit. Raises ``InputError``."""
    train = own_data(policy, run, task or policy.tasks[0]).train
    return len(np.unique(persons_of(train, policy.user_column))) if policy.privacy_unit == "user" else len(train)


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
    settings: dict[str, Any] = {
        "data_source": "folder" if policy.data_source == "images" else policy.data_source,
        "data_path": policy.data_path,
        "cache_dir": policy.cache,
        "input_columns": _by_commas(policy.input_columns),
        "label_column": policy.label_column,
        "user_column": policy.user_column,
        "class_names": _by_commas(policy.class_names),
        "columns_file": policy.columns_file,
        "tokenizer": policy.tokenizer,
        "max_length": policy.max_length,
        "task": task,
    }
    if policy.content == "images":
        channels, *size = policy.image_shape
        columns = policy.input_columns or (policy.image_column,)
        settings |= {"input_columns": _by_commas(columns), "image_size": size, "channels": channels}
        settings |= {"fit": policy.fit, "mean": policy.mean, "std": policy.std}
    arguments = ", ".join([*filter(None, [policy.dataset_args]), "all_private = true"])
    made: Dataset = plugins.build("dataset", policy.content, settings, arguments)
    return dataclasses.replace(made, name=policy.dataset)


def _by_commas(names: Sequence[str]) -> str:
    """``names`` as a setting has them, each in quotes."""
    return ", ".join('"' + name.replace('"', '""') + '"' for name in names)


def _dataset(policy: Policy, train: Examples, **declared: Any) -> Dataset:
    fields = {"name": policy.dataset, "class_names": policy.class_names, **declared}
    numbers = isinstance(train.labels, Tensor) and train.labels.dtype == torch.float32
    classes, needs = len(fields["class_names"]), train.labels is not None and not numbers
    if not len(train) or (needs and not classes):
        raise DataError(f"{len(train)} examples of {classes} classes; a device needs at least one each")
    return Dataset(**fields, train=train, test=train.rows(torch.arange(0)))
