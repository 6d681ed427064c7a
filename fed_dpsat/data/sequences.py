"""Sequences of different length, end to end in one array: tokens of texts, or a class for each of their positions.

An example is padded to a length that follows from its own (``padded_length``), and never from those beside it. A model
may read its padding, such as the last state of a recurrent layer. If a batch were padded to its longest example, that
one would change the gradients of all others, and their sum by more than one clip norm.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_dpsat.errors import DataError

SHORTEST = 8
"""No sequence is padded to less, if ``max_length`` allows it."""
IGNORED = -100
"""The target of a position that has no loss, as in torch and transformers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """``N`` sequences of whole numbers: sequence i is ``values[offsets[i]:offsets[i + 1]]``.

    =============== ========================================================================
    field           is
    =============== ========================================================================
    values          ``[total]``: uint8, int16, int32 or int64; may be memory-mapped
    offsets         ``[N + 1]`` int64, from 0 up to at most ``total``
    max_length      the longest that a sequence may be; declared, not measured
    vocabulary_size a value is in ``[0, vocabulary_size)``; a label may be -100 too, which has no loss
    padding         the value after the end of a sequence in a batch; a mask tells it apart
    mask_token      the value that hides a token in masked-lm; -1 without one
    =============== ========================================================================

    Raises ``DataError`` for another type, offsets that fall, or a sequence longer than ``max_length``; a ``Dataset``
    checks the values.
    """

    values: Tensor
    offsets: Tensor
    max_length: int
    vocabulary_size: int
    padding: int = 0
    mask_token: int = -1

    def __post_init__(self) -> None:
        types = (torch.uint8, torch.int16, torch.int32, torch.int64)
        if self.values.dtype not in types or self.values.ndim != 1:
            raise DataError(
                f"sequences hold {self.values.dtype} {list(self.values.shape)}, not whole numbers [total]; convert them"
            )
        if self.offsets.dtype != torch.int64 or self.offsets.ndim != 1 or not len(self.offsets):
            raise DataError(
                f"offsets are {self.offsets.dtype} {list(self.offsets.shape)}, not int64 [N + 1]; convert them"
            )
        if self.max_length < 1:
            raise DataError(f"max_length={self.max_length} is not at least 1; declare the longest that a text may be")
        lengths = self.lengths
        if int(self.offsets[0]) < 0 or int(self.offsets[-1]) > len(self.values) or bool((lengths < 0).any()):
            raise DataError(f"offsets do not rise from 0 to {len(self.values)}; sequence i ends where i + 1 begins")
        if bool((lengths > self.max_length).any()):
            row = int((lengths > self.max_length).nonzero()[0])
            raise DataError(
                f"sequence {row} has {int(lengths[row])} values, more than max_length={self.max_length}; cut it off"
            )
        if not 0 <= self.padding < self.vocabulary_size:
            raise DataError(
                f"padding={self.padding} is not in [0, vocabulary_size={self.vocabulary_size}); choose one of these"
            )
        if not -1 <= self.mask_token < self.vocabulary_size:
            raise DataError(
                f"mask_token={self.mask_token} is not in [0, vocabulary_size={self.vocabulary_size}); choose one of "
                "these, or -1 for none"
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """``[N]`` int64."""
        return self.offsets.diff()

    def rows(self, indices: Tensor) -> Sequences:
        """The sequences of ``indices[K]``, in that order."""
        at, lengths = self._places(indices)
        offsets = torch.zeros(len(indices) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        return dataclasses.replace(self, values=self.values[at], offsets=offsets)

    def padded_lengths(self, indices: Tensor) -> Tensor:
        """``[K]``: the length that each sequence of ``indices[K]`` has with padding, from its own length alone.

        The next of 8, 12, 16, 24, 32, 48, ..., at most ``max_length``.
        """
        self._check(indices)
        lengths = self.offsets[indices + 1] - self.offsets[indices]
        steps = torch.tensor(_steps(self.max_length))
        return steps[torch.searchsorted(steps, lengths)]

    def padded(self, name: str, indices: Tensor, device: torch.device | None = None) -> dict[str, Tensor]:
        """``{name: [B, T], mask: [B, T]}``, int64; T is the largest padded length, the mask 1 for a value and else 0.

        The mask is called as ``mask_name`` says.
        """
        values, mask = self._filled(indices, self.padding, self.longest(indices))
        device = device or self.values.device
        return {name: values.to(device), mask_name(name): mask.to(device)}

    def longest(self, indices: Tensor) -> int:
        """The largest padded length of ``indices``, which may be empty."""
        return int(self.padded_lengths(indices).max()) if len(indices) else _steps(self.max_length)[0]

    def targets(self, indices: Tensor, length: int, device: torch.device | None = None) -> Tensor:
        """``[B, length]`` int64, -100 after the end of a sequence."""
        values, _ = self._filled(indices, IGNORED, length)
        return values.to(device or self.values.device)

    def check_within(self, bound: int, what: str, *, ignored: bool = False) -> None:
        """Raise ``DataError`` for a value outside ``[0, bound)``; with ``ignored`` -100 may be there too."""
        step = 2**24
        for start in range(0, len(self.values), step):
            part = self.values[start : start + step]
            low, high = part.aminmax()
            if int(low) >= 0 and int(high) < bound:
                continue
            part = part.to(torch.int64)  # a bound above 255 is another number in uint8
            outside = (part < 0) | (part >= bound)
            wrong = torch.nonzero(outside & (part != IGNORED) if ignored else outside)
            if len(wrong):
                at = start + int(wrong[0])
                row = int(torch.searchsorted(self.offsets, at, right=True)) - 1
                raise DataError(f"{what} {int(self.values[at])} in row {row} is not in [0, {bound}); correct it")

    def _places(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Where the values of the sequences of ``indices`` are, one after the other, and the lengths ``[K]``."""
        self._check(indices)
        starts, ends = self.offsets[indices], self.offsets[indices + 1]
        lengths = ends - starts
        before = torch.cumsum(lengths, 0) - lengths
        at = torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)
        return at, lengths

    def _check(self, indices: Tensor) -> None:
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= len(self)):
            raise IndexError(f"an index outside [0, {len(self)})")

    def _filled(self, indices: Tensor, padding: int, length: int) -> tuple[Tensor, Tensor]:
        at, lengths = self._places(indices)
        mask = torch.arange(length)[None] < lengths[:, None]
        values = torch.full((len(indices), length), padding, dtype=torch.int64)
        values[mask] = self.values[at].to(torch.int64)
        return values, mask.to(torch.int64)


def mask_name(name: str) -> str:
    """What the mask of the sequences ``name`` is called: "attention_mask" for "input_ids", as transformers has it."""
    return "attention_mask" if name == "input_ids" else f"{name}_mask"


@functools.cache
def _steps(max_length: int) -> tuple[int, ...]:
    found, step = [], SHORTEST
    while step < max_length:
        found += [step, step + step // 2]
        step *= 2
    return (*(length for length in found if length < max_length), max(1, max_length))
