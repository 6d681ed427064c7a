"""Which files and rows are the private training split, and which the public test split: always by a declared rule.

============================== =================================================================================
rule                           the public test split is
============================== =================================================================================
none of these                  files (or folders, or splits of ``datasets``) whose names begin with ``test_split``
``test_path``                  all of another file or folder
``split_column``               rows with ``test_split`` in that column
``test_share``                 each row with that chance, drawn from the seed
``all_private``                nothing
============================== =================================================================================

The training split has ``train_split`` in these places, and rows of a third split are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]

from fed_dpsat.data.described.chunks import Chunk, chunk_names
from fed_dpsat.data.described.find import Part
from fed_dpsat.data.described.place import REMEDY, Place
from fed_dpsat.data.described.readers import Wanted
from fed_dpsat.errors import DataError
from fed_dpsat.step.noise import derive_generator


def divided(parts: Sequence[Part], place: Place, wanted: Wanted) -> Iterator[tuple[str, Chunk]]:
    """The chunks of all parts in order, each with its split. Raises ``DataError`` for a split without rows."""
    generator = derive_generator(place.seed, purpose="test split")
    columns: dict[str, Any] = dict(wanted)
    if place.split_column:
        columns.setdefault(place.split_column, "any")
    rows = {"train": 0, "test": 0}
    for split, _, read in parts:
        for chunk in read(columns):
            if split:
                cut = [(split, chunk)]
            elif place.split_column:
                names = chunk_names(chunk, place.split_column)
                chunk.refuse(np.asarray(names.is_null()), place.split_column, lambda _: "has no split; give it one")
                begins = (("train", place.train_split), ("test", place.test_split))
                cut = [(s, chunk.picked(np.asarray(pc.equal(names, name)))) for s, name in begins]
            else:
                public = generator.random(len(chunk)) < place.test_share
                cut = [("train", chunk.picked(~public)), ("test", chunk.picked(public))]
            for one, rest in cut:
                rows[one] += len(rest)
                if len(rest):
                    yield one, rest
    if place.all_private and not rows["train"]:
        raise DataError(f"{place.data_path}: there is no row; name files with examples")
    if not all(rows[split] for split in place.splits):
        raise DataError(f"{place.data_path}: {rows['train']} train and {rows['test']} test rows; {REMEDY}")
