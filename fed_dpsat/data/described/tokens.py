"""What makes tokens of texts: bytes, or a tokenizer of ``tokenizers`` and transformers.

======= =======================
token   of the byte tokenizer
======= =======================
0..255  a byte of UTF-8
256     padding
257     mask
258     begin, with add_special_tokens
259     end, with add_special_tokens
======= =======================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from fed_dpsat.errors import SettingError

PADDING, MASK, BEGIN, END, BYTE_TOKENS = 256, 257, 258, 259, 260


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenized:
    """Tokens of ``n`` texts end to end, at most ``max_length`` of each."""

    values: np.ndarray  # [total]
    lengths: np.ndarray  # [n] int64
    cut: int  # texts with more than max_length tokens
    words: np.ndarray  # [total] int64: the word that begins at a token, or -1


class Tokens(ABC):
    """A tokenizer with the numbers that ``Sequences`` needs; ``mask_token`` is -1 for a tokenizer without one."""

    vocabulary_size: int
    padding: int
    mask_token: int

    @abstractmethod
    def texts(self, columns: Sequence[Any]) -> Tokenized:
        """Tokens of ``pyarrow`` strings ``[n]``, of one column or of several that are joined; ``words`` is empty."""

    @abstractmethod
    def words(self, rows: Sequence[Sequence[str]]) -> Tokenized:
        """Tokens of texts that are lists of words."""


@dataclass(frozen=True, kw_only=True)
class ByteTokens(Tokens):
    """Bytes of UTF-8; several columns have ``separator`` between them, and words a space."""

    max_length: int
    add_special_tokens: bool = False
    separator: str = "\n"
    vocabulary_size: int = BYTE_TOKENS
    padding: int = PADDING
    mask_token: int = MASK

    def __post_init__(self) -> None:
        check_room(self.max_length, 2 if self.add_special_tokens else 0)

    def texts(self, columns: Sequence[Any]) -> Tokenized:
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        joined = columns[0] if len(columns) == 1 else pc.binary_join_element_wise(*columns, self.separator)
        raw = joined.cast(pa.large_binary())
        _, places, data = raw.buffers()
        offsets = np.frombuffer(places, np.int64)[raw.offset : raw.offset + len(raw) + 1]
        whole = np.diff(offsets)
        special = 2 if self.add_special_tokens else 0
        lengths = np.minimum(whole, self.max_length - special)
        begins = np.cumsum(lengths) - lengths
        at = np.arange(lengths.sum()) + np.repeat(offsets[:-1] - begins, lengths)
        values = np.frombuffer(data, np.uint8)[at] if len(at) else np.zeros(0, np.uint8)
        if special:
            values = np.insert(values.astype(np.int16), begins, BEGIN)
            values = np.insert(values, np.cumsum(lengths + 1), END)
        return Tokenized(
            values=values,
            lengths=lengths + special,
            cut=int((whole > self.max_length - special).sum()),
            words=np.zeros(0, np.int64),
        )

    def words(self, rows: Sequence[Sequence[str]]) -> Tokenized:
        found = self.texts([pa.array([" ".join(row) for row in rows], pa.string())])
        begins = []
        for row, length in zip(rows, found.lengths, strict=True):
            sizes = np.array([len(word.encode()) + 1 for word in row], dtype=np.int64)
            at = np.cumsum(sizes) - sizes + self.add_special_tokens
            words = np.full(length, -1, dtype=np.int64)
            kept = at < length - self.add_special_tokens
            words[at[kept]] = np.flatnonzero(kept)
            begins.append(words)
        return Tokenized(
            values=found.values, lengths=found.lengths, cut=found.cut, words=np.concatenate([*begins, found.words])
        )


def check_room(max_length: int, special: int) -> None:
    """Raise ``SettingError`` if special tokens leave no room for a text."""
    if max_length <= special:
        remedy = "raise it, or set add_special_tokens = false in dataset_args"
        raise SettingError("max_length", max_length, f"above the {special} special tokens of a text", remedy)
