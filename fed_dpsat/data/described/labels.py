"""The labels of a task, from one or more columns: always of a declared set, or with declared constants.

==================== =================================================== ==========================================
``task``             ``label_column``                                    labels
==================== =================================================== ==========================================
classification       one column of class names                           int64 ``[n]``
multilabel           one column of lists, or of names with a separator   uint8 ``[n, K]``
\\                    a column of 0 and 1 for each class                  uint8 ``[n, K]``
regression           one number, or several                              float32 ``[n]``, or ``[n, K]``, as in the file
token-classification one column of lists of class names                  by ``encode_text``
==================== =================================================== ==========================================

A value stands for the class of its name. If no class has a whole number for its name, a whole number stands for the
class at that place in ``class_names``, from 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from fed_dpsat.data.described.chunks import Chunk, Kind, chunk_names, chunk_numbers, is_text, names_of, shown
from fed_dpsat.data.described.columns import Column, Number
from fed_dpsat.data.names import split_names
from fed_dpsat.errors import DataError, SettingError

OF_EXAMPLES = ("classification", "multilabel", "regression")
OF_WORDS = "token-classification"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What makes the labels of ``task`` from ``columns``. Raises ``SettingError`` for a task without its settings."""

    task: str
    columns: tuple[str, ...]
    class_names: tuple[str, ...]
    separator: str = ";"
    numbers: Mapping[str, Number]

    @classmethod
    def of(
        cls,
        task: str,
        label_column: str,
        class_names: str,
        declared: Mapping[str, Column],
        separator: str = ";",
        *,
        of_words: bool = False,
    ) -> Labels:
        """From the settings; ``of_words`` if each word of a text can have a label."""
        columns, names = split_names(label_column), split_names(class_names)
        if task not in (tasks := (*OF_EXAMPLES, OF_WORDS) if of_words else OF_EXAMPLES):
            remedy = "choose one, or say with labels_like in dataset_args whose labels a task of your own takes"
            raise SettingError("task", task, f"one of {', '.join(tasks)} for these data", remedy)
        if not columns:
            raise SettingError("label_column", label_column, "the name of a column", f"task={task!r} has labels")
        if len(columns) > 1 and task in ("classification", OF_WORDS):
            raise SettingError("label_column", label_column, "one column", "task='multilabel' takes several")
        if task == "regression":
            scales = {name: declared.get(name, Number(name=name)) for name in columns}
            for name, scale in scales.items():
                if not isinstance(scale, Number) or scale.missing is not None:
                    raise SettingError(f"columns.{name}", scale, "a number that is never missing", "it is a label")
            return cls(
                task=task,
                columns=columns,
                class_names=columns,
                numbers={n: s for n, s in scales.items() if isinstance(s, Number)},
            )
        if len(columns) > 1 and not names:
            names = columns
        check_names("class_names", class_names, names)
        if len(columns) > 1 and len(names) != len(columns):
            raise SettingError(
                "class_names", class_names, f"{len(columns)} names", "name the class of each label column"
            )
        return cls(task=task, columns=columns, class_names=names, separator=separator, numbers={})

    @property
    def of_dataset(self) -> dict[str, Any]:
        """The fields of a ``Dataset`` that say what its labels are."""
        scale = tuple((number.shift, number.scale) for number in self.numbers.values())
        return {"class_names": self.class_names, "label_scale": scale}

    @property
    def wanted(self) -> dict[str, Kind]:
        """The columns, and what they are read as."""
        return dict.fromkeys(self.columns, "number" if self.task == "regression" else "any")

    def encoded(self, chunk: Chunk) -> np.ndarray:
        """The labels of ``chunk``. Raises ``DataError`` with file and row for one that is missing or undeclared."""
        if self.task == "regression":
            values = np.concatenate([self._number(chunk, number) for number in self.numbers.values()], axis=1)
            return values if len(self.columns) > 1 else values[:, 0]
        (first, *more) = self.columns
        if self.task == "classification":
            return self._codes(chunk, first)
        return self._flags(chunk) if more else self._several(chunk, first)

    @staticmethod
    def _number(chunk: Chunk, number: Number) -> np.ndarray:
        """In the units of the file, which metrics have: the loss scales it."""
        return dataclasses.replace(number, shift=0.0, scale=1.0).encoded(chunk)

    def _codes(self, chunk: Chunk, column: str) -> np.ndarray:
        names = chunk_names(chunk, column)
        codes = codes_of(names, self.class_names)
        chunk.refuse(codes < 0, column, lambda i: undeclared(names[i].as_py(), self.class_names))
        return codes

    def _flags(self, chunk: Chunk) -> np.ndarray:
        return np.stack([self._flag(chunk, column) for column in self.columns], axis=1)

    def _flag(self, chunk: Chunk, column: str) -> np.ndarray:
        values = chunk_numbers(chunk, column)
        wrong = (values != 0) & (values != 1)
        chunk.refuse(wrong, column, lambda i: f"is {values[i]:g}, not 0 or 1; correct it")
        return values.astype(np.uint8)

    def _several(self, chunk: Chunk, column: str) -> np.ndarray:
        flags = np.zeros((len(chunk), len(self.class_names)), dtype=np.uint8)
        for row, names in enumerate(self._lists(chunk, column)):
            codes = codes_of(pa.array(names, pa.string()), self.class_names)
            if (codes < 0).any():
                wrong = names[int(np.flatnonzero(codes < 0)[0])]
                raise DataError(f"{chunk.at(row)}: column {column!r} {undeclared(wrong, self.class_names)}")
            flags[row, codes] = 1
        return flags

    def _lists(self, chunk: Chunk, column: str) -> list[Sequence[str | None]]:
        kind = chunk.column(column).type
        if not is_text(kind):
            return name_lists(chunk, column)
        texts = chunk_names(chunk, column)
        chunk.refuse(np.asarray(texts.is_null()), column, lambda _: "has no label; correct it, or write an empty text")
        return [[n.strip() for n in text.split(self.separator) if n.strip()] for text in texts.to_pylist()]


def check_names(setting: str, given: str, names: tuple[str, ...]) -> None:
    """Raise ``SettingError`` for no names, or one that is there twice."""
    if not names:
        remedy = "declare all classes by commas; they are not looked up in private rows"
        raise SettingError(setting, given, "a list of names", remedy)
    if len(set(names)) < len(names):
        raise SettingError(setting, given, "without repetition", "name each class once")


def codes_of(names: object, class_names: tuple[str, ...]) -> np.ndarray:
    """int64 ``[n]``, the class of each name (``pyarrow`` strings), -1 for one that is undeclared or null."""
    known = list(class_names)
    if not any(_is_whole(name) for name in class_names):
        known += map(str, range(len(class_names)))
    found = pc.index_in(names, value_set=pa.array(known, pa.string()))
    codes = np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), dtype=np.int64)
    return np.where(codes < 0, -1, codes % len(class_names))


def name_lists(chunk: Chunk, column: str) -> list[Sequence[str | None]]:
    """The names in each row of a column of lists. Raises ``DataError`` for another column, and a row without a list."""
    values = chunk.column(column)
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        raise DataError(f"{chunk.at(0)}: column {column!r} is {values.type}, not lists; name another column")
    chunk.refuse(np.asarray(values.is_null()), column, lambda _: "has no list; correct it, or write an empty one")
    return [[None if one is None else names_of([one])[0] for one in row] for row in values.to_pylist()]


def undeclared(name: object, class_names: tuple[str, ...]) -> str:
    """What is wrong with a label, and the remedy."""
    listed = ", ".join(map(repr, class_names[:20])) + (", ..." if len(class_names) > 20 else "")
    if name is None:
        return f"has no label; give it one of class_names ({listed}), or remove it"
    return f"has the label {shown(name)}, which is not one of class_names ({listed}); correct it, or declare the class"


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
