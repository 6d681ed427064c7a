"""The partition by a column of the data set: one client for each writer, hospital or speaker."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Mapping

import numpy as np

from fed_dpsat.data.partition import begin
from fed_dpsat.errors import DataError


def natural(
    columns: Mapping[str, np.ndarray], num_examples: int, num_clients: int, seed: int, partition_by: str = ""
) -> list[np.ndarray]:
    """One client for each value of the column ``partition_by``; whole values share a client if there are fewer clients.

    ===================================== ================================================================
    ``num_clients``                       clients
    ===================================== ================================================================
    the number of values ``V``            client i holds the i-th of the sorted values, for every seed
    fewer                                 from the largest value to the smallest (equal ones in an order of
                                          ``seed``), each goes to the client with the fewest examples
    more                                  ``DataError`` with ``V``
    ===================================== ================================================================

    A value is never divided: with ``privacy_unit=client``, epsilon covers all examples of a writer. Source of the order
    of values: Graham, "Bounds on Multiprocessing Timing Anomalies" (1969); the largest client has at most 4/3 of the
    examples that the largest client of the best division has.
    """
    begin(num_examples, num_clients, seed)
    values, codes = coded(columns, partition_by, "natural")
    if num_clients > len(values):
        raise DataError(
            f"num_clients={num_clients} is more than the {len(values)} values of the column {partition_by!r} among the "
            f"training examples; choose a number in [1, {len(values)}]"
        )
    client_of = np.arange(len(values))
    if num_clients < len(values):
        client_of = _evenly(np.bincount(codes), num_clients, np.random.default_rng(seed))
    clients = client_of[codes]
    ends = np.cumsum(np.bincount(clients, minlength=num_clients))
    return np.split(np.argsort(clients, kind="stable"), ends[:-1])


def column(columns: Mapping[str, np.ndarray], name: str, partition: str) -> np.ndarray:
    """``[N]``, the column ``name`` of a data set, after a check that each example has a value.

    Raises ``DataError`` for a column that is missing, with the names of those there are; and for None, NaN and empty
    text.
    """
    if name not in columns:
        if not columns:
            raise DataError(
                f"partition={partition!r} needs a column, and the data set has none; for your own files set "
                f"user_column={name or 'COLUMN'!r}; in Python give Examples its columns; or choose iid or size-skew"
            )
        near = difflib.get_close_matches(name, columns, n=1)
        raise DataError(
            f"partition_by={name!r} is not a column of the data set, and partition={partition!r} needs one; "
            + (f"did you mean {near[0]}? " if near else "")
            + f"there are {', '.join(columns)}"
        )
    values = columns[name]
    if values.ndim != 1:
        raise DataError(f"column {name!r} is {values.dtype} {list(values.shape)}, not one value for each example [N]")
    if len(missing := np.flatnonzero(without_value(values))):
        raise DataError(
            f"column {name!r} has no value for {len(missing)} of {len(values)} training examples, the first is "
            f"{missing[0]}; give each a value, or remove the example"
        )
    return values


def without_value(values: np.ndarray) -> np.ndarray:
    """``[N]`` bool: whether a value is missing, which is None, NaN, NaT or an empty text."""
    none: np.ndarray = (values != values) | (values == None) | (values == "")  # noqa: E711
    return none


def coded(columns: Mapping[str, np.ndarray], name: str, partition: str) -> tuple[np.ndarray, np.ndarray]:
    """``(values[V], codes[N])``: the sorted values of a ``column``, and each example's place among them."""
    values = column(columns, name, partition)
    try:
        found, codes = np.unique(values, return_inverse=True)
    except TypeError as error:
        raise DataError(f"column {name!r} mixes types ({error}); convert it to text") from None
    return found, codes.astype(np.int64)


def _evenly(sizes: np.ndarray, num_clients: int, generator: np.random.Generator) -> np.ndarray:
    """``[V]``: the client of each of the values with ``sizes[V]``, so that clients have about equally many examples."""
    shuffled = generator.permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    smallest = [(0, client) for client in range(num_clients)]
    client_of = np.empty(len(sizes), dtype=np.int64)
    for value in order.tolist():
        size, client = smallest[0]
        client_of[value] = client
        heapq.heapreplace(smallest, (size + int(sizes[value]), client))
    return client_of


PARTITIONS = {"natural": natural}
