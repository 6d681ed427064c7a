"""The types of a data set: labelled examples in two splits, and the names of the classes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.errors import InputError


class DataError(InputError):
    """A data set or a partition is invalid or unavailable; the message gives a remedy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """``inputs[N, C, ...]`` (uint8 0..255, or float32) with ``labels[N]`` (int64), without a conversion.

    ``mean`` and ``std`` hold one number per channel, in the units of the input scaled to 0..1 (uint8) or of
    the input itself (float32). Memory-mapped tensors stay mapped: a batch reads only its rows.

    Raises ``DataError`` for another dtype, lengths that differ, or a std that is not positive.
    """

    inputs: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.inputs.dtype not in (torch.uint8, torch.float32) or self.inputs.ndim < 2:
            raise DataError(
                f"inputs are {self.inputs.dtype} {list(self.inputs.shape)}, "
                f"not uint8 or float32 [N, C, ...]; convert them"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.inputs.shape[:1]:
            raise DataError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)}, "
                f"not int64 [{len(self.inputs)}]; give one class number per input"
            )
        channels = self.inputs.shape[1]
        if len(self.mean) != channels or len(self.std) != channels:
            raise DataError(f"mean={self.mean} and std={self.std} need one number for each of {channels} channels")
        if not all(math.isfinite(m) for m in self.mean) or not all(0 < s < math.inf for s in self.std):
            raise DataError(f"mean={self.mean}, std={self.std}: a mean must be finite and a std in (0, inf)")

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: Tensor) -> Examples:
        """The examples of ``indices[K]`` (int64), in that order."""
        return dataclasses.replace(self, inputs=self.inputs[indices], labels=self.labels[indices])

    def batch(self, indices: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Normalised ``(inputs[B, C, ...] float32, labels[B])`` of ``indices[B]`` (int64), on ``device`` or as stored.

        ``(x / 255 - mean) / std`` per channel for uint8, ``(x - mean) / std`` for float32. The result is a
        copy. Empty ``indices`` give an empty batch; an index outside [0, N) raises ``IndexError``.
        """
        per_channel = [-1] + [1] * (self.inputs.ndim - 2)
        device = device or self.inputs.device
        # a transfer as uint8 moves a quarter of the bytes
        rows = self.inputs.index_select(0, indices).to(device).to(torch.float32)
        if self.inputs.dtype == torch.uint8:
            rows /= 255
        rows -= torch.tensor(self.mean, device=device).view(per_channel)
        rows /= torch.tensor(self.std, device=device).view(per_channel)
        return rows, self.labels.index_select(0, indices).to(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A private training split, which is divided among clients, and a public test split.

    Raises ``DataError`` if the splits differ in shape or a label is not one of ``class_names``.
    """

    name: str
    train: Examples
    test: Examples
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.train.inputs.shape[1:] != self.test.inputs.shape[1:]:
            raise DataError(
                f"{self.name}: train inputs are {list(self.input_shape)}, "
                f"test inputs {list(self.test.inputs.shape[1:])}; make them one shape"
            )
        for split, labels in (("train", self.train.labels), ("test", self.test.labels)):
            wrong = torch.nonzero((labels < 0) | (labels >= self.num_classes))
            if len(wrong):
                row = int(wrong[0])
                raise DataError(
                    f"{self.name}: {split} label {int(labels[row])} of row {row} is not in "
                    f"[0, {self.num_classes}); correct it or name more classes"
                )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, ``(C, ...)``."""
        return tuple(self.train.inputs.shape[1:])


def check_plain(dataset: Dataset) -> None:
    """Raise ``DataError`` for a subclass of ``Dataset``, ``Examples`` or ``Tensor``, whose batches may mix examples."""
    if type(dataset) is not Dataset:
        raise DataError(f"dataset={type(dataset).__name__!r} is not Dataset itself; return a Dataset of Examples")
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        remedy = "put a transform into the model, where it sees one example"
        if type(split) is not Examples or vars(split).keys() != Examples.__dataclass_fields__.keys():
            raise DataError(f"{dataset.name}: {name} split {type(split).__name__!r} is not Examples itself; {remedy}")
        for part, tensor in (("inputs", split.inputs), ("labels", split.labels)):
            if type(tensor) is not Tensor:
                kind = type(tensor).__name__
                raise DataError(f"{dataset.name}: {name} {part} of class {kind!r} is not a plain Tensor; {remedy}")
