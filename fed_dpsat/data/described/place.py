"""Where the examples of a data set are, and the declared rule that says which of them are public."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fed_dpsat.errors import DataError, SettingError
from fed_dpsat.left import successor

RULES = ("test_path", "split_column", "test_share", "all_private")
REMEDY = "name the public test split: test_path, test_share, or split_column in dataset_args"

SOURCES = {
    "table": ("csv", "jsonl", "parquet", "disk", "hub"),
    "text": ("csv", "jsonl", "parquet", "folder", "disk", "hub"),
    "image": ("parquet", "folder", "disk", "hub"),
}
"""By the content of a data set, the values of ``data_source``."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the examples are, and the rule of the splits. Raises ``SettingError`` for two rules at once.

    ============= =====================================================================================
    argument      is
    ============= =====================================================================================
    split_column  the column that says the split of a row
    train_split   how names of files and folders of the training split begin, or its whole name elsewhere
    test_split    the same of the test split
    delimiter     what is between the values of a CSV file; a tab in files that end with .tsv
    hub_repo      owner/name of a data set on the Hub
    hub_config    the name of its configuration, if it has several
    suffix        how names of files of texts end
    per_line      whether each line of a file of texts is an example
    all_private   whether all rows are of the training split, and there is no test split, as on a device
    ============= =====================================================================================
    """

    data_source: str
    data_path: str
    test_path: str = ""
    test_share: float = 0.0
    seed: int = 0
    content: str = "text"
    split_column: str = ""
    train_split: str = "train"
    test_split: str = "test"
    delimiter: str = ","
    hub_repo: str = ""
    hub_config: str = ""
    suffix: str = ".txt"
    per_line: bool = False
    all_private: bool = False

    def __post_init__(self) -> None:
        if self.data_source not in SOURCES[self.content]:
            listed = ", ".join(SOURCES[self.content])
            raise SettingError("data_source", self.data_source, f"one of {listed}", "say what the files are")
        if len(given := [rule for rule in RULES if getattr(self, rule)]) > 1:
            first, second = given[:2]
            raise SettingError(second, getattr(self, second), f"possible with {first}", "keep one of them")
        if self.train_split == self.test_split:
            raise SettingError("test_split", self.test_split, "another name than train_split", "name both splits")
        if self.data_source == "folder" and self.split_column:
            raise SettingError("split_column", self.split_column, "possible with data_source='folder'", REMEDY)

    @classmethod
    def of(cls, arguments: Mapping[str, object], *, test_share: float, seed: int, **settings: str) -> Place:
        """From settings and ``arguments`` of ``dataset_args``. Raises ``SettingError`` for a name or type of one."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in arguments.items():
            if name not in known or name in settings:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "leave it out"
                raise SettingError(
                    name,
                    value,
                    "an argument of this data set",
                    successor(name) or hint,
                )
            check_types(type(known[name].default), **{name: value})
        # without a share the seed decides nothing, and each seed would have a cache of its own
        rest: dict[str, Any] = {**settings, **arguments}
        return cls(test_share=test_share, seed=seed if test_share else 0, **rest)

    @property
    def by_name(self) -> bool:
        """Whether names of files say the split."""
        return not any(getattr(self, rule) for rule in RULES)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have rows."""
        return ("train",) if self.all_private else ("train", "test")

    def split_of(self, name: str) -> str | None:
        """The split that a name says: "train", "test" or None."""
        found = [s for s, begin in (("train", self.train_split), ("test", self.test_split)) if name.startswith(begin)]
        if len(found) > 1:
            raise DataError(f"{name!r} begins with train_split and test_split; choose names that tell them apart")
        return found[0] if found else None


def check_types(kind: type, **arguments: object) -> None:
    """Raise ``SettingError`` for an argument of ``dataset_args`` of another type."""
    for name, value in arguments.items():
        if type(value) is not kind:
            raise SettingError(name, value, f"of type {kind.__name__}", "correct it in dataset_args")
