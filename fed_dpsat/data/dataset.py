"""The types of a data set: labelled examples in two splits, and the names of the classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.data.sequences import Sequences, mask_name
from fed_dpsat.errors import DataError

Leaf: TypeAlias = Tensor | Sequences
"""One row for each example."""

WHOLE = (torch.int64, torch.int32, torch.int16)
INPUT_TYPES = (torch.uint8, torch.float32, torch.float16, *WHOLE)
INPUTS = "inputs"
"""The name in errors of the one array of inputs that has no name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """``N`` examples: their ``inputs``, their ``labels``, and ``columns`` that only a partition sees.

    ======== ================================================================= ======================================
    field    is                                                                in a batch
    ======== ================================================================= ======================================
    inputs   uint8 or float32 ``[N, C, ...]``                                  float32, normalised per channel
    \\        float16 ``[N, ...]`` (features)                                   float32
    \\        whole numbers ``[N, ...]`` (categories)                           int64
    \\        several by name, also ``Sequences`` (tokens: "input_ids")         a dictionary: arguments of the model
    labels   int64 ``[N]``: a class; float32 ``[N]`` or ``[N, K]``: numbers    as they are
    \\        uint8 ``[N, K]``: for each class, whether it is one (0 or 1)      float32
    \\        ``Sequences``: a class for each position                          int64 ``[B, T]``, padding -100
    \\        None: the label is the text itself                                its tokens, padding -100
    columns  by name, one value for each example ``[N]``                       not in it
    ======== ================================================================= ======================================

    ``mean`` and ``std`` hold one number per channel of the one array of inputs without a name, in the units of the
    input scaled to 0..1 (uint8) or of the input itself (float32). Memory-mapped tensors stay mapped: a batch reads only
    its rows.

    Raises ``DataError`` for another dtype, lengths that differ, or a std that is not positive.
    """

    inputs: Tensor | Mapping[str, Leaf]
    labels: Leaf | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor | Sequences | Mapping):
            _check_array("inputs", self.inputs)
        if not self.leaves:
            raise DataError("inputs have no array; give at least one")
        for name, leaf in self.leaves.items():
            _check_array(name, leaf)
            if not isinstance(leaf, Sequences) and (leaf.dtype not in INPUT_TYPES or leaf.ndim < 1):
                raise DataError(
                    f"{name} are {leaf.dtype} {list(leaf.shape)}, not uint8, float32, float16 or whole numbers "
                    "[N, ...]; convert them"
                )
        if clash := sorted(self.leaves.keys() & {mask_name(name) for name in self.texts}):
            raise DataError(f"{clash[0]!r} is the mask that a batch has for its text; give that input another name")
        self._check_scale()
        lengths = {name: len(leaf) for name, leaf in self.leaves.items()}
        lengths |= {f"column {name!r}": len(values) for name, values in self.columns.items()}
        if self.labels is not None:
            _check_array("labels", self.labels)
            lengths["labels"] = len(self.labels)
        if len(set(lengths.values())) > 1:
            raise DataError(f"{lengths}: these numbers of examples differ; give one row of each for each example")
        self._check_labels()

    def _check_labels(self) -> None:
        labels, text = self.labels, next(iter(self.texts.values()), None)
        if labels is None:
            if len(self.texts) != 1:
                raise DataError(f"labels=None with inputs {list(self.leaves)}: the label is the one text; give labels")
        elif isinstance(labels, Sequences):
            if text is None:
                raise DataError(
                    f"labels are sequences, and no input of {list(self.leaves)} is: a class for each position needs a "
                    "text; make the input Sequences"
                )
            if len(other := torch.nonzero(text.lengths != labels.lengths)):
                row = int(other[0])
                raise DataError(
                    f"the text of row {row} has {int(text.lengths[row])} positions, and its labels have "
                    f"{int(labels.lengths[row])}; give each position one"
                )
        else:
            kinds = {torch.int64: (1,), torch.float32: (1, 2), torch.uint8: (2,)}
            if labels.ndim not in kinds.get(labels.dtype, ()):
                raise DataError(
                    f"labels are {labels.dtype} {list(labels.shape)}, not int64 [N] (a class), float32 [N] or [N, K] "
                    "(numbers) or uint8 [N, K] (several classes); convert them"
                )
            if labels.ndim == 2 and not labels.shape[1]:
                raise DataError(f"labels are {labels.dtype} {list(labels.shape)}, without a number for each example")
            if labels.dtype == torch.float32 and not bool((finite := labels.isfinite()).all()):
                raise DataError(
                    f"the label of row {int(torch.nonzero(~finite)[0, 0])} is NaN or infinite; correct it, or remove "
                    "the example"
                )

    def _check_scale(self) -> None:
        one = self.inputs
        if isinstance(one, Tensor) and one.dtype in (torch.uint8, torch.float32):
            if one.ndim < 2:
                raise DataError(f"inputs are {one.dtype} {list(one.shape)}, not [N, C, ...]; give each its features")
            channels = one.shape[1]
        else:
            channels = 0
        if len(self.mean) != channels or len(self.std) != channels:
            remedy = "leave them out: they scale one array of uint8 or float32"
            if isinstance(one, Tensor) and channels:
                scale = "in 0..1" if one.dtype == torch.uint8 else "unscaled"
                remedy = f"mean=(0.0,) * {channels}, std=(1.0,) * {channels} leave the inputs {scale}"
            raise DataError(
                f"mean={self.mean} and std={self.std} need one number for each of {channels} channels; {remedy}"
            )
        if not all(math.isfinite(m) for m in self.mean) or not all(0 < s < math.inf for s in self.std):
            raise DataError(f"mean={self.mean}, std={self.std}: a mean must be finite and a std in (0, inf)")

    @property
    def leaves(self) -> dict[str, Leaf]:
        """The arrays of inputs by name; one without a name is called "inputs"."""
        return dict(self.inputs) if isinstance(self.inputs, Mapping) else {INPUTS: self.inputs}

    @property
    def texts(self) -> dict[str, Sequences]:
        """The inputs that are sequences, by name."""
        return {name: leaf for name, leaf in self.leaves.items() if isinstance(leaf, Sequences)}

    @property
    def classes(self) -> np.ndarray | None:
        """``[N]`` int64, the class of each example; None if labels are something else."""
        one = self.labels
        return one.numpy() if isinstance(one, Tensor) and one.dtype == torch.int64 else None

    def of_classes(self, what: str) -> tuple[Tensor, Tensor]:
        """``inputs[N, C, ...]`` and the class of each, ``[N]``; ``DataError`` that ``what`` needs such examples."""
        if not isinstance(self.inputs, Tensor) or not isinstance(self.labels, Tensor) or self.classes is None:
            raise DataError(f"{what} needs examples that are one array with a class each; leave it out for other data")
        return self.inputs, self.labels

    def __len__(self) -> int:
        return len(next(iter(self.leaves.values())))

    def rows(self, indices: Tensor) -> Examples:
        """The examples of ``indices[K]`` (int64), in that order."""
        inputs = self.inputs
        return dataclasses.replace(
            self,
            inputs=inputs[indices] if isinstance(inputs, Tensor) else {n: _rows(x, indices) for n, x in inputs.items()},
            labels=None if self.labels is None else _rows(self.labels, indices),
            columns={name: values[indices.numpy()] for name, values in self.columns.items()},
        )

    def alike(self, indices: Tensor) -> list[Tensor]:
        """Places ``[b]`` in ``indices[B]``, group by group, of examples whose sequences are padded to equal lengths.

        A batch of one group has no padding that depends on other examples, as clipping needs it. One group if there
        are no sequences.
        """
        texts = self.texts
        if not texts or not len(indices):
            return [torch.arange(len(indices))]
        lengths = torch.stack([text.padded_lengths(indices) for text in texts.values()], 1)
        _, group = torch.unique(lengths, dim=0, return_inverse=True)
        return [torch.nonzero(group == k)[:, 0] for k in range(int(group.max()) + 1)]

    def batch(self, indices: Tensor, device: torch.device | None = None) -> tuple[Tensor | dict[str, Tensor], Tensor]:
        """``(inputs, targets)`` of ``indices[B]`` (int64), on ``device`` or as stored; both are copies.

        ``(x / 255 - mean) / std`` per channel for uint8, ``(x - mean) / std`` for float32. Sequences are padded to the
        longest of the batch (see ``alike``), and have a mask of 1 and 0 (int64). Empty ``indices`` give an empty batch;
        an index outside [0, N) raises ``IndexError``.
        """
        if isinstance(self.inputs, Tensor):  # the way of an image, which a step of a small model notices
            return self._scaled(self.inputs, indices, device), self._targets(indices, device)
        found: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            if isinstance(leaf, Sequences):
                found |= leaf.padded(name, indices, device)
            elif leaf.dtype == torch.uint8:
                found[name] = leaf.index_select(0, indices).to(device or leaf.device).to(torch.float32) / 255
            else:
                found[name] = _wide(leaf.index_select(0, indices).to(device or leaf.device))
        return found, self._targets(indices, device)

    def _scaled(self, inputs: Tensor, indices: Tensor, device: torch.device | None) -> Tensor:
        device = device or inputs.device
        # a transfer as uint8 moves a quarter of the bytes
        rows = inputs.index_select(0, indices).to(device)
        if not self.mean:
            return _wide(rows)
        per_channel = [-1] + [1] * (inputs.ndim - 2)
        rows = rows.to(torch.float32)
        if inputs.dtype == torch.uint8:
            rows /= 255
        rows -= torch.tensor(self.mean, device=device).view(per_channel)
        rows /= torch.tensor(self.std, device=device).view(per_channel)
        return rows

    def _targets(self, indices: Tensor, device: torch.device | None) -> Tensor:
        labels = next(iter(self.texts.values())) if self.labels is None else self.labels
        if isinstance(labels, Sequences):
            text = next(iter(self.texts.values()), labels)
            return labels.targets(indices, text.longest(indices), device)
        rows = labels.index_select(0, indices).to(device or labels.device)
        return rows.to(torch.float32) if labels.dtype == torch.uint8 else rows


def _check_array(name: str, leaf: object) -> None:
    """Raise ``DataError`` unless ``leaf`` is a tensor or ``Sequences``."""
    if isinstance(leaf, Tensor | Sequences):
        return
    remedy = "convert them with torch.as_tensor"
    if isinstance(leaf, tuple | list) and any(isinstance(one, Tensor | Sequences) for one in leaf):
        remedy = "give a dict of arrays; its keys are the arguments of forward"
    raise DataError(f"{name} are a {type(leaf).__name__}, not a tensor; {remedy}")


def _rows(leaf: Leaf, indices: Tensor) -> Leaf:
    return leaf.rows(indices) if isinstance(leaf, Sequences) else leaf[indices]


def _wide(rows: Tensor) -> Tensor:
    return rows.to(torch.float32 if rows.is_floating_point() else torch.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A private training split, which is divided among clients, and a public test split.

    ``class_names`` are those of classes or, for labels that are numbers, those of the numbers; empty if there are none.
    ``label_scale`` has the declared ``(mean, std)`` of each number that is a label; empty leaves them as they are.
    ``declared`` is a SHA-256 of what else was declared of columns and texts, and ``tokenizer`` that of the files of the
    tokenizer, or "bytes"; both are empty if nothing was declared. ``features`` is the SHA-256 of the public extractor
    whose features the inputs are, empty for inputs as they came.

    Raises ``DataError`` if the splits differ in form or a label is not one of ``class_names``.
    """

    name: str
    train: Examples
    test: Examples
    class_names: tuple[str, ...] = ()
    label_scale: tuple[tuple[float, float], ...] = ()
    declared: str = ""
    tokenizer: str = ""
    features: str = ""

    def __post_init__(self) -> None:
        train, test = (_forms(split) for split in (self.train, self.test))
        for name in train | test:
            if train.get(name) != test.get(name):
                raise DataError(
                    f"{self.name}: train {name} are {train.get(name, 'missing')}, "
                    f"test {name} {test.get(name, 'missing')}; make them one shape"
                )
        for split, examples in (("train", self.train), ("test", self.test)):
            for name, text in examples.texts.items():
                text.check_within(text.vocabulary_size, f"{self.name}: {split} {name}")
            self._check_labels(split, examples.labels)
        scale = self.label_scale
        if scale and not _is_scale(scale, self.num_labels):
            raise DataError(
                f"{self.name}: label_scale={scale} is not one finite mean and one std in (0, inf) for each of "
                f"{self.num_labels} numbers; correct it"
            )

    def _check_labels(self, split: str, labels: Leaf | None) -> None:
        if isinstance(labels, Sequences):
            labels.check_within(self.num_classes, f"{self.name}: {split} label", ignored=True)
        elif labels is not None and labels.dtype == torch.int64:
            _check_each(labels, self.num_classes, f"{self.name}: {split} label", "or name more classes")
        elif labels is not None and labels.dtype == torch.uint8:
            _check_each(labels.flatten(), 2, f"{self.name}: {split} label", "or give 0 and 1 alone")
        if labels is None or isinstance(labels, Sequences) or labels.ndim == 1:
            return
        if labels.shape[1] != self.num_classes:
            raise DataError(
                f"{self.name}: {split} labels have {labels.shape[1]} columns for {self.num_classes} class_names; "
                "name each column"
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_labels(self) -> int:
        """How many numbers the label of an example has: 1 for labels ``[N]``, K for ``[N, K]``."""
        labels = self.train.labels
        return labels.shape[1] if isinstance(labels, Tensor) and labels.ndim > 1 else 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, ``(C, ...)``, or ``(max_length,)`` of one text; ``()`` for several inputs."""
        leaves = self.train.leaves
        if len(leaves) > 1:
            return ()
        (leaf,) = leaves.values()
        return (leaf.max_length,) if isinstance(leaf, Sequences) else tuple(leaf.shape[1:])

    @property
    def of_texts(self) -> dict[str, int]:
        """What a model of texts is made for: ``vocabulary_size``, ``padding`` and ``mask_token`` of the first text.

        Without a text 0, -1 and -1.
        """
        text = next(iter(self.train.texts.values()), None)
        if text is None:
            return {"vocabulary_size": 0, "padding": -1, "mask_token": -1}
        return {"vocabulary_size": text.vocabulary_size, "padding": text.padding, "mask_token": text.mask_token}


def _forms(split: Examples) -> dict[str, str]:
    """By array: what has to be equal in both splits."""
    forms = {
        name: f"sequences of at most {leaf.max_length}, {leaf.vocabulary_size} tokens, padding {leaf.padding}"
        if isinstance(leaf, Sequences)
        else f"{'whole numbers ' if leaf.dtype in WHOLE else ''}{list(leaf.shape[1:])}"
        for name, leaf in split.leaves.items()
    }
    labels = split.labels
    if isinstance(labels, Tensor):
        forms["labels"] = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape[1:])}"
    else:
        forms["labels"] = "the text" if labels is None else "a class for each position"
    return forms


def _is_scale(scale: object, count: int) -> bool:
    """Whether it is ``count`` pairs of a finite number and a positive one."""
    if not isinstance(scale, tuple | list) or len(scale) != count:
        return False
    pairs = (tuple(pair) if isinstance(pair, tuple | list) else () for pair in scale)
    return all(
        len(pair) == 2 and all(isinstance(n, int | float) and math.isfinite(n) for n in pair) and pair[1] > 0
        for pair in pairs
    )


def _check_each(labels: Tensor, bound: int, what: str, remedy: str) -> None:
    wrong = torch.nonzero((labels < 0) | (labels >= bound))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"{what} {int(labels[row])} of row {row} is not in [0, {bound}); correct it {remedy}")


def check_plain(dataset: Dataset) -> None:
    """Raise ``DataError`` for a subclass of the classes of a data set or ``Tensor``, whose batches may mix examples."""
    if type(dataset) is not Dataset:
        raise DataError(f"dataset={type(dataset).__name__!r} is not Dataset itself; return a Dataset of Examples")
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        remedy = "put a transform into the model, where it sees one example"
        if type(split) is not Examples or vars(split).keys() != Examples.__dataclass_fields__.keys():
            raise DataError(f"{dataset.name}: {name} split {type(split).__name__!r} is not Examples itself; {remedy}")
        parts: dict[str, object] = dict(split.leaves)
        if split.labels is not None:
            parts["labels"] = split.labels
        for part, leaf in parts.items():
            tensors = [leaf]
            if type(leaf) is Sequences and vars(leaf).keys() == Sequences.__dataclass_fields__.keys():
                tensors = [leaf.values, leaf.offsets]
            if any(type(tensor) is not Tensor for tensor in tensors):
                kind = type(leaf).__name__
                raise DataError(f"{dataset.name}: {name} {part} of class {kind!r} is not a plain Tensor; {remedy}")
