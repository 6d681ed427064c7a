"""Whether two processes, or a run and its resumption, have the same clients, data and frozen layers: by one number.

A process that builds a run from names trusts plug-ins to build the same each time. One that draws from a generator of
the process's own would deal an example to two clients, in two processes or before and after a pause, and no epsilon
covers that; or train a client on other rows, or behind other frozen weights, than the server evaluates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.sequences import Sequences

MOST_BYTES = 2**28
"""Of the inputs of a split: a second's work. Of larger ones, rows at equal distances are taken."""
CHUNK_BYTES = 2**24


def contents(
    dataset: Dataset,
    partitions: Sequence[np.ndarray],
    module: nn.Module,
    sent: Collection[str],
    persons: np.ndarray | None = None,
) -> dict[str, str]:
    """SHA-256 in hex of the parts that no message carries: the data, the partition, and ``module`` without ``sent``.

    ``sent`` names the parameters that a server sends, so that their values in this process do not matter.
    ``persons[N]`` are those of the training examples, if they are the unit.
    """
    data = hashlib.sha256(json.dumps(dataset.class_names).encode())
    if dataset.label_scale:
        data.update(json.dumps(dataset.label_scale).encode())
    for split in (dataset.train, dataset.test):
        _add_examples(data, split)
    if persons is not None:
        _add(data, torch.from_numpy(persons))
    parts = hashlib.sha256()
    _add(parts, torch.tensor([len(part) for part in partitions]))
    _add(parts, torch.from_numpy(np.concatenate(partitions)))
    return {"dataset": data.hexdigest(), "partition": parts.hexdigest(), "model": unsent(module, sent)}


def unsent(module: nn.Module, sent: Collection[str]) -> str:
    """SHA-256 in hex of the parameters and buffers of ``module`` without ``sent``."""
    rest = hashlib.sha256()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if name not in sent:
            rest.update(name.encode())
            _add(rest, value)
    return rest.hexdigest()


def fingerprint(found: Mapping[str, str]) -> str:
    """One SHA-256 of all ``contents``."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _add_examples(digest: Any, split: Examples) -> None:
    if isinstance(split.inputs, Tensor):
        digest.update(json.dumps([list(split.inputs.shape), split.mean, split.std]).encode())
    parts = {**split.leaves, **({} if split.labels is None else {"labels": split.labels})}
    for name, leaf in sorted(parts.items(), key=lambda part: part[0] != "labels"):
        if not isinstance(split.inputs, Tensor):
            digest.update(name.encode())
        if isinstance(leaf, Sequences):
            form = [leaf.max_length, leaf.vocabulary_size, leaf.padding, leaf.mask_token]
            digest.update(json.dumps(form).encode())
            _add(digest, leaf.offsets)
            _add_rows(digest, leaf.values)
        elif name == "labels":
            _add(digest, leaf)
        else:
            _add_rows(digest, leaf)


def _add_rows(digest: Any, values: Tensor) -> None:
    """Add ``values[N, ...]``, or rows of them at equal distances if they are more than ``MOST_BYTES``."""
    if not len(values):
        return
    row = max(1, values[0].nbytes)
    chosen = torch.arange(0, len(values), max(1, -(-row * len(values) // MOST_BYTES)))
    for rows in torch.split(chosen, max(1, CHUNK_BYTES // row)):
        _add(digest, values[rows])


def _add(digest: Any, values: Tensor) -> None:
    """Add type, shape and bytes of a tensor on any device."""
    digest.update(json.dumps([str(values.dtype), list(values.shape)]).encode())
    if values.numel():
        flat = values.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
