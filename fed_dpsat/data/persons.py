"""The person of each example, by a column of the data set: what ``privacy_unit=user`` protects."""

from __future__ import annotations

import difflib

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.data.dataset import Examples
from fed_dpsat.data.names import split_names
from fed_dpsat.data.natural import without_value
from fed_dpsat.errors import DataError


def persons_of(examples: Examples, user_column: str) -> NDArray[np.int64]:
    """``[N]``, the number of the person of each example, in the order of the values of the first of ``user_column``.

    Raises ``DataError`` for a column that is missing, that is not one value for each example, or that lacks one.
    """
    name, columns = split_names(user_column)[0], examples.columns
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DataError(
            f"user_column={name!r} is not a column of the data set, and privacy_unit=user needs it; {hint}"
            f"there are {', '.join(columns) or 'none: in Python give Examples its columns'}"
        )
    values = columns[name]
    if values.ndim != 1:
        raise DataError(f"column {name!r} is {values.dtype} {list(values.shape)}, not one person for each example [N]")
    if len(missing := np.flatnonzero(without_value(values))):
        raise DataError(
            f"user_column={name!r} has no value for {len(missing)} of {len(values)} training examples, the first is "
            f"{missing[0]}; give each a person, or remove the example"
        )
    try:
        return np.unique(values, return_inverse=True)[1].astype(np.int64)
    except TypeError as error:
        raise DataError(f"user_column={name!r} mixes types ({error}); convert it to text") from None
