"""From a place and an encoder to arrays in the cache: one pass over the files, a chunk at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

from fed_dpsat.data.cache import Arrays, cached_parts, fingerprint
from fed_dpsat.data.dataset import Examples
from fed_dpsat.data.described.chunks import Chunk, Kind, chunk_names
from fed_dpsat.data.described.find import Part, parts_of
from fed_dpsat.data.described.place import Place
from fed_dpsat.data.described.progress import counted, rows_in
from fed_dpsat.data.described.splits import divided
from fed_dpsat.data.names import split_names


class Encoder(ABC):
    """What makes arrays of chunks, in one pass."""

    def begin(self) -> Arrays:
        """Arrays that belong to no split, by name; nothing if all are of a split."""
        return {}

    @abstractmethod
    def encode(self, split: str, chunk: Chunk) -> Arrays:
        """The arrays of the rows of ``chunk``, by name."""


def load(
    name: str,
    place: Place,
    *,
    wanted: Mapping[str, Kind],
    encoder: Encoder,
    decided: Mapping[str, Any],
    user_column: str,
    cache_dir: str,
    libraries: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The arrays of ``encoder`` and of ``user_column`` with "train_" and "test_" before their names.

    ``wanted`` are the columns that ``encoder`` reads, and ``decided`` (JSON types) is what its result depends on beside
    the files; so are ``libraries``, by their version. Raises ``DataError``.
    """
    users, parts = split_names(user_column), parts_of(place)
    rule = {key: value for key, value in dataclasses.asdict(place).items() if key not in ("data_path", "test_path")}
    versions = {library: version(library) for library in ("pyarrow", *libraries)}
    files = [file for _, files, _ in parts for file in files]
    splits = [of for of, _, _ in parts]
    key = fingerprint({**decided, **rule, **versions, "users": users, "splits": splits}, files)
    folder = Path(cache_dir).expanduser().absolute() / f"{name}-{key}"
    columns: dict[str, Kind] = dict(wanted)
    for user in users:
        columns.setdefault(user, "any")
    return cached_parts(folder, partial(_arrays, parts, place, columns, users, encoder))


def _arrays(
    parts: Sequence[Part], place: Place, columns: Mapping[str, Kind], users: Sequence[str], encoder: Encoder
) -> Iterator[Arrays]:
    found: dict[str, list[np.ndarray]] = {f"{split}_user{i}": [] for split in place.splits for i in range(len(users))}
    yield encoder.begin()
    files = [file for _, files, _ in parts for file in files]
    for split, chunk in counted(divided(parts, place, columns), place, rows_in(place, files)):
        yield {f"{split}_{name}": array for name, array in encoder.encode(split, chunk).items()}
        for i, user in enumerate(users):
            found[f"{split}_user{i}"].append(_users(chunk, user))
    for name, values in found.items():
        whole = np.concatenate(values)
        yield {name: whole if whole.dtype == np.int64 else whole.view(np.int32).reshape(len(whole), -1)}


def _users(chunk: Chunk, column: str) -> np.ndarray:
    """int64 or strings ``[n]``."""
    values = chunk.column(column)
    chunk.refuse(np.asarray(values.is_null()), column, lambda _: "names no user; correct it")
    if pa.types.is_integer(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.int64)
    return np.array(chunk_names(chunk, column).to_pylist(), dtype=np.str_)


def examples(arrays: Mapping[str, Tensor], split: str, user_column: str, **fields: Any) -> Examples:
    """``Examples`` with ``fields``, and the columns of users in ``arrays``."""
    columns = {}
    for i, user in enumerate(split_names(user_column)):
        stored = arrays[f"{split}_user{i}"].numpy()
        columns[user] = stored if stored.ndim == 1 else stored.view(f"<U{stored.shape[1]}")[:, 0]
    return Examples(columns=columns, **fields)


def both_splits(place: Place, split: Callable[[str], Examples]) -> dict[str, Any]:
    """The splits "train" and "test", each from its name; the test split is empty if all rows are private."""
    train = split("train")
    return {"train": train, "test": train.rows(torch.arange(0)) if place.all_private else split("test")}


def sha256_of(*declared: object) -> str:
    """SHA-256 in hex of declarations (JSON types)."""
    return hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()
