"""The rows of a table as features and labels."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fed_dpsat.data.cache import Arrays
from fed_dpsat.data.described.chunks import Chunk, Kind
from fed_dpsat.data.described.columns import Category, Column, Number
from fed_dpsat.data.described.labels import Labels
from fed_dpsat.data.described.load import Encoder
from fed_dpsat.data.names import split_names
from fed_dpsat.errors import SettingError

log = logging.getLogger("fed_dpsat")
ENCODINGS = ("one-hot", "codes")


@dataclass(frozen=True, kw_only=True)
class TableEncoder(Encoder):
    """Features of ``columns`` in their order. Raises ``SettingError`` for another encoding and for no columns."""

    columns: tuple[Column, ...]
    labels: Labels
    encoding: str
    others: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise SettingError("encoding", self.encoding, f"one of {', '.join(ENCODINGS)}", "set it in dataset_args")
        if not self.columns:
            remedy = "declare columns in dataset_args, or in columns_file"
            raise SettingError("input_columns", "", "a list of declared columns", remedy)

    @classmethod
    def of(cls, input_columns: str, known: Mapping[str, Column], labels: Labels, encoding: str) -> TableEncoder:
        """Of ``input_columns`` or, if it is empty, of all ``known`` columns that are no labels."""
        names = split_names(input_columns) or tuple(name for name in known if name not in labels.columns)
        for name in names:
            if name in labels.columns:
                raise SettingError("input_columns", input_columns, f"without the label {name!r}", "name only inputs")
            if name not in known:
                remedy = f"declare {name} in columns of dataset_args, or in columns_file"
                raise SettingError("input_columns", input_columns, f"all declared: {name!r} is not", remedy)
        return cls(columns=tuple(known[name] for name in names), labels=labels, encoding=encoding)

    @property
    def wanted(self) -> dict[str, Kind]:
        """The columns of inputs and labels, and what they are read as."""
        inputs: dict[str, Kind] = {c.name: "number" if isinstance(c, Number) else "any" for c in self.columns}
        return inputs | self.labels.wanted

    def encode(self, split: str, chunk: Chunk) -> Arrays:
        found = {"labels": self.labels.encoded(chunk)}
        self._count(chunk)
        if self.encoding == "one-hot":
            return found | {"inputs": np.concatenate([column.encoded(chunk) for column in self.columns], axis=1)}
        if numbers := [column.encoded(chunk) for column in self.columns if isinstance(column, Number)]:
            found["numbers"] = np.concatenate(numbers, axis=1)
        if categories := [column.codes(chunk) for column in self.columns if isinstance(column, Category)]:
            found["categories"] = np.stack(categories, axis=1)
        return found

    def report(self) -> None:
        """Log which columns have values that are not declared; nothing if the cache was there."""
        for name, count in self.others.items():
            log.warning('column %r has %d values that are missing or not declared: they are "other"', name, count)

    def _count(self, chunk: Chunk) -> None:
        for column in self.columns:
            if isinstance(column, Category) and (count := int((column.codes(chunk) == len(column.values)).sum())):
                self.others[column.name] += count
