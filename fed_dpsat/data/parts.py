"""The check of any partition: no two clients share an example, because epsilon is for one example of one client."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fed_dpsat.errors import DataError

REMEDIES = {"b": "np.flatnonzero makes whole numbers of a mask", "f": ".astype(np.int64) makes whole numbers of it"}


def disjoint_parts(parts: Any, *, num_clients: int, num_examples: int, partition: str) -> list[np.ndarray]:
    """``num_clients`` int64 index arrays ``[n_i]`` in the order of ``parts``; copies.

    ``parts`` is any iterable of sequences of integers: lists, ranges, arrays, tensors. Raises ``DataError`` with
    ``partition``, the part and a remedy:

    ====================================== ==================================
    more or fewer than ``num_clients``     one part per client
    an empty part                          at least one example each
    a mask, floats, text, two dimensions   integers ``[n]``
    a masked array                         ``compressed()``
    a number outside ``[0, num_examples)`` an index of the training split
    an example twice in a part, or in two  one client for each
    ====================================== ==================================
    """
    name = f"partition={partition!r}"
    if not isinstance(parts, Iterable) or isinstance(parts, Mapping | str | bytes):
        raise DataError(f"{name} made a {type(parts).__name__}; return a list of index arrays, one per client")
    found = list(parts)
    if len(found) != num_clients:
        raise DataError(f"{name} made {len(found)} parts, not num_clients={num_clients}; make one per client")
    whole = [_whole(part, name, client) for client, part in enumerate(found)]
    sizes = np.array([len(part) for part in whole])
    together = np.concatenate(whole, dtype=np.int64, casting="unsafe")  # a number above int64 becomes negative
    ends = np.cumsum(sizes)
    outside = np.flatnonzero((together < 0) | (together >= num_examples))
    if len(outside):
        client = int(np.searchsorted(ends, outside[0], side="right"))
        wrong = whole[client][outside[0] - ends[client] + sizes[client]]
        raise DataError(
            f"{name}: part {client} holds {wrong}, not in [0, {num_examples}); give indices of the training split, "
            "which validation_share makes smaller"
        )
    counts = np.bincount(together, minlength=num_examples)
    if len(twice := np.flatnonzero(counts > 1)):
        first, second = np.searchsorted(ends, np.flatnonzero(together == twice[0])[:2], side="right").tolist()
        where = f"twice in part {first}" if first == second else f"in parts {first} and {second}"
        raise DataError(
            f"{name}: example {twice[0]} is {where}, but epsilon holds for examples of one client only; give each "
            "example to one client, once"
        )
    borders = [0, *ends.tolist()]
    return [together[start:end] for start, end in itertools.pairwise(borders)]


def _whole(part: Any, partition: str, client: int) -> np.ndarray:
    """``part`` as a non-empty one-dimensional array of integers."""
    name = f"{partition}: part {client}"
    if np.ma.is_masked(part):
        raise DataError(f"{name} is a masked array; give part.compressed()")
    if type(part) is not np.ndarray and isinstance(part, np.ndarray):
        part = np.array(part, subok=False)  # the methods of a subclass may hide its content
    if isinstance(part, np.ndarray) and part.ndim == 1 and len(part) and part.dtype.kind in "iu":
        return part
    try:
        array = np.asarray(part)
    except (ValueError, TypeError) as error:
        raise DataError(f"{name} is not an array ({str(error).splitlines()[0]}); give whole numbers [n]") from None
    if array.ndim == 1 and not len(array):
        raise DataError(f"{name} is empty; a client needs at least one example: lower num_clients, or change the seed")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        remedy = REMEDIES.get(array.dtype.kind, "give whole numbers [n]")
        raise DataError(f"{name} is {array.dtype} {list(array.shape)}, not whole numbers [n]; {remedy}")
    return array
