"""What a data set holds and how it is divided among clients, as numbers; no model is needed.

Label counts, ranges, lengths, columns and sizes of the training split are private data of the clients. A simulation
has them in one place; a server of a real federation does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fed_dpsat.data.dataset import Dataset, Examples, Leaf
from fed_dpsat.data.natural import without_value
from fed_dpsat.data.sequences import IGNORED, Sequences

Number: TypeAlias = float | int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Five of the sorted values, at 0, 25, 50, 75 and 100 %: each is one of them, not a mean."""

    least: Number
    quarter: Number
    median: Number
    three_quarters: Number
    most: Number

    @classmethod
    def of(cls, values: ArrayLike) -> Spread | None:
        """The spread of ``values[n]``; None for n = 0."""
        array = np.asarray(values)
        if not array.size:
            return None
        found = np.quantile(array, (0, 0.25, 0.5, 0.75, 1), method="inverted_cdf").tolist()
        return cls(least=found[0], quarter=found[1], median=found[2], three_quarters=found[3], most=found[4])


Spreads: TypeAlias = Mapping[str, Spread | None]
"""By split."""


@dataclass(frozen=True, kw_only=True)
class Array:
    """One array of inputs: the ``shape`` of one example; of a text, also what is declared and its ``lengths``."""

    name: str
    type: str
    shape: tuple[int, ...]
    vocabulary_size: int = 0
    lengths: Spreads = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Labels:
    """``counts[class][split]`` for classes, ``ranges[number][split]`` for numbers; ``kind`` says which they are."""

    kind: str
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    ranges: Mapping[str, Spreads] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the training split: its number of ``values``, the ``examples`` of a value, and how many have none."""

    name: str
    type: str
    values: int
    examples: Spread | None
    missing: int


@dataclass(frozen=True, kw_only=True)
class Clients:
    """A partition: ``sizes[client]``, ``counts[client][class]``, and the number of classes and values of a client.

    ``counts`` and ``classes`` are None for labels that are no classes. ``values`` are those of the column
    ``partition_by``, None without one; ``called[client]`` is the value of each client if each has one. ``unused``
    examples are in no part, and no client holds an example of the classes ``unheld``.
    """

    partition: str
    partition_by: str
    sizes: Sequence[int]
    size: Spread | None
    unused: int
    counts: Sequence[Sequence[int]] | None = None
    classes: Spread | None = None
    unheld: tuple[str, ...] = ()
    values: Spread | None = None
    called: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Description:
    """A data set in numbers: ``examples`` by split, arrays, labels, columns, and its division among clients.

    ``features`` is the SHA-256 of the extractor whose features the inputs are; empty for inputs as they came.
    """

    name: str
    examples: Mapping[str, int]
    inputs: tuple[Array, ...]
    labels: Labels
    columns: tuple[Column, ...]
    clients: Clients
    features: str = ""


def describe(dataset: Dataset, partitions: Sequence[np.ndarray], partition: str, partition_by: str = "") -> Description:
    """The numbers of ``dataset`` and of its ``partitions``, which ``partition`` made by the column ``partition_by``."""
    splits = {"train": dataset.train, "test": dataset.test}
    return Description(
        name=dataset.name,
        examples={split: len(examples) for split, examples in splits.items()},
        inputs=tuple(
            _array(name, leaf, {split: examples.leaves[name] for split, examples in splits.items()})
            for name, leaf in dataset.train.leaves.items()
        ),
        labels=_labels(splits, dataset.class_names),
        columns=tuple(_column(name, values) for name, values in dataset.train.columns.items()),
        clients=_clients(dataset, partitions, partition, partition_by),
        features=dataset.features,
    )


def _array(name: str, leaf: Leaf, by_split: Mapping[str, Leaf]) -> Array:
    if isinstance(leaf, Sequences):
        lengths = {s: Spread.of(one.lengths.numpy()) for s, one in by_split.items() if isinstance(one, Sequences)}
        return Array(
            name=name,
            type="sequences",
            shape=(leaf.max_length,),
            vocabulary_size=leaf.vocabulary_size,
            lengths=lengths,
        )
    return Array(name=name, type=str(leaf.dtype).removeprefix("torch."), shape=tuple(leaf.shape[1:]))


def _labels(splits: Mapping[str, Examples], class_names: tuple[str, ...]) -> Labels:
    one = splits["train"].labels
    if one is None:
        return Labels(kind="the text itself")
    if isinstance(one, Tensor) and one.dtype == torch.float32:
        width = one.shape[1] if one.ndim == 2 else 1
        columns = {split: _whole(examples.labels).reshape(len(examples), width) for split, examples in splits.items()}
        names = class_names if len(class_names) == width else tuple(f"number {place}" for place in range(width))
        ranges = {
            name: {split: Spread.of(values[:, place]) for split, values in columns.items()}
            for place, name in enumerate(names)
        }
        return Labels(kind="numbers", ranges=ranges)
    counts = {split: _counts(examples.labels, len(class_names)).tolist() for split, examples in splits.items()}
    several = "several classes" if isinstance(one, Tensor) else "a class for each position"
    return Labels(
        kind="a class" if isinstance(one, Tensor) and one.dtype == torch.int64 else several,
        counts={name: {split: counts[split][place] for split in splits} for place, name in enumerate(class_names)},
    )


def _counts(labels: Leaf | None, num_classes: int) -> np.ndarray:
    """``[num_classes]``: how often each class is a label."""
    if isinstance(labels, Tensor) and labels.dtype == torch.uint8:
        return labels.sum(0, dtype=torch.int64).numpy()
    return np.bincount(_whole(labels), minlength=num_classes)


def _whole(labels: Leaf | None) -> np.ndarray:
    if isinstance(labels, Sequences):
        values = labels.values[int(labels.offsets[0]) : int(labels.offsets[-1])].numpy()
        counted: np.ndarray = values[values != IGNORED]
        return counted
    return np.empty(0) if labels is None else labels.numpy()


def _column(name: str, values: np.ndarray) -> Column:
    missing = without_value(values)
    times = Counter(values[~missing].tolist())
    return Column(
        name=name,
        type="text" if values.dtype.kind in "USO" else str(values.dtype),
        values=len(times),
        examples=Spread.of(list(times.values())),
        missing=int(missing.sum()),
    )


def _clients(dataset: Dataset, partitions: Sequence[np.ndarray], partition: str, partition_by: str) -> Clients:
    train, names = dataset.train, dataset.class_names
    sizes = [len(part) for part in partitions]
    by, labels = train.columns.get(partition_by), train.classes
    counts, unheld = None, []
    if labels is not None:
        counts = np.stack([np.bincount(labels[part], minlength=len(names)) for part in partitions])
        unheld = np.flatnonzero((counts.sum(0) == 0) & (np.bincount(labels, minlength=len(names)) > 0)).tolist()
    values = [] if by is None else [sorted({*map(str, by[part].tolist())}) for part in partitions]
    return Clients(
        partition=partition,
        partition_by="" if by is None else partition_by,
        sizes=sizes,
        size=Spread.of(sizes),
        unused=len(train) - sum(sizes),
        counts=None if counts is None else counts.tolist(),
        classes=None if counts is None else Spread.of((counts > 0).sum(1)),
        unheld=tuple(names[place] for place in unheld),
        values=Spread.of([len(of_client) for of_client in values]),
        called=[of_client[0] for of_client in values] if all(len(of_client) == 1 for of_client in values) else (),
    )
