"""Texts as tokens end to end, with labels of each text, or of each word, or none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from fed_dpsat.data.cache import Arrays
from fed_dpsat.data.described.chunks import Chunk, Kind, chunk_texts
from fed_dpsat.data.described.labels import OF_WORDS, Labels, codes_of, name_lists, undeclared
from fed_dpsat.data.described.load import Encoder
from fed_dpsat.data.described.tokens import Tokenized, Tokens
from fed_dpsat.data.sequences import IGNORED
from fed_dpsat.errors import DataError

log = logging.getLogger("fed_dpsat")


@dataclass(kw_only=True)
class TextEncoder(Encoder):
    """Tokens of ``columns``; ``labels`` of each text, or None. ``tokens`` makes the tokenizer, at the first chunk."""

    columns: tuple[str, ...]
    labels: Labels | None
    tokens: Callable[[], Tokens]
    errors: str
    totals: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"texts": 0, "cut": 0, "empty": 0})

    @property
    def wanted(self) -> dict[str, Kind]:
        """The columns of texts and labels, and what they are read as."""
        of_words = self.labels is not None and self.labels.task == OF_WORDS
        inputs: dict[str, Kind] = dict.fromkeys(self.columns, "any" if of_words else "text")
        return inputs | (self.labels.wanted if self.labels else {})

    def begin(self) -> Arrays:
        """The numbers of the tokenizer, so that only the first run loads it."""
        self.made = self.tokens()
        return {"tokens": np.array([self.made.vocabulary_size, self.made.padding, self.made.mask_token])}

    def encode(self, split: str, chunk: Chunk) -> Arrays:
        found: dict[str, np.ndarray] = {}
        if self.labels and self.labels.task == OF_WORDS:
            tokenized, found["labels"] = self._of_words(chunk, self.labels)
        else:
            tokenized = self.made.texts([self._texts(chunk, column) for column in self.columns])
            if self.labels:
                found["labels"] = self.labels.encoded(chunk)
        self.counts["texts"] += len(chunk)
        self.counts["cut"] += tokenized.cut
        self.counts["empty"] += int((tokenized.lengths == 0).sum())
        before = self.totals.get(split)
        ends = (before or 0) + np.cumsum(tokenized.lengths)
        self.totals[split] = int(ends[-1])
        return found | {"values": tokenized.values, "offsets": ends if before is not None else np.append(0, ends)}

    def report(self, max_length: int) -> None:
        """Log how many texts were cut or have no token, if any; nothing if the cache was there."""
        if self.counts["cut"] or self.counts["empty"]:
            log.warning(
                "of %d texts, %d have more than max_length=%d tokens and are cut there, and %d have none",
                *(self.counts["texts"], self.counts["cut"], max_length, self.counts["empty"]),
            )

    def _texts(self, chunk: Chunk, column: str) -> pa.Array:
        texts = chunk_texts(chunk, column, self.errors)
        chunk.refuse(np.asarray(texts.is_null()), column, lambda _: "has no text; correct it, or write an empty one")
        return texts

    def _of_words(self, chunk: Chunk, labels: Labels) -> tuple[Tokenized, np.ndarray]:
        (column,), (label_column,) = self.columns, labels.columns
        words, names = name_lists(chunk, column), name_lists(chunk, label_column)
        wrong = np.array([len(a) != len(b) or not all(a) for a, b in zip(words, names, strict=True)])
        lengths = [(len(a), len(b)) for a, b in zip(words, names, strict=True)]
        remedy = "give each word, which is not empty, one label"
        chunk.refuse(wrong, column, lambda i: f"has {lengths[i][0]} words and {lengths[i][1]} labels; {remedy}")
        tokenized = self.made.words([[word or "" for word in row] for row in words])
        codes = codes_of(pa.array([name for row in names for name in row], pa.string()), labels.class_names)
        if (codes < 0).any():
            at = int(np.flatnonzero(codes < 0)[0])
            row = int(np.searchsorted(np.cumsum([b for _, b in lengths]), at, side="right"))
            wrong_name = [name for of in names for name in of][at]
            raise DataError(f"{chunk.at(row)}: column {label_column!r} {undeclared(wrong_name, labels.class_names)}")
        return tokenized, _at_tokens(tokenized, codes, [b for _, b in lengths])


def _at_tokens(tokenized: Tokenized, codes: np.ndarray, words: Sequence[int]) -> np.ndarray:
    """int16 or int32 ``[total]``: the class of the word that begins at a token, and -100 elsewhere."""
    before = np.repeat(np.cumsum([0, *words[:-1]]), tokenized.lengths)
    begins = tokenized.words >= 0
    found = np.full(len(tokenized.values), IGNORED, dtype=np.int32)
    found[begins] = codes[(tokenized.words + before)[begins]]
    return found
