"""The partitioners of flwr-datasets that have no partition of our own, each by its own name.

=================== ============================ =================================================
name                divides by                   arguments by ``partition_args``
=================== ============================ =================================================
continuous          numbers of a column          strictness
distribution        class                        distribution_array, preassigned_num_samples_per_label
exponential         size                         none
grouped-natural-id  values of a column           group_size
id-to-size-fnc      size                         partition_id_to_size_fn = "module:function"
inner-dirichlet     class                        none needed
linear              size                         none
natural-id          values of a column           none
pathological        class                        none needed
size                size                         partition_sizes
square              size                         none
=================== ============================ =================================================

``partition_args`` takes the other arguments of the class too. The run fills four of them: ``num_partitions`` is
``num_clients``, ``partition_by`` is the class, or the column that the setting ``partition_by`` names, ``seed`` comes
from the run, and ``shuffle`` is off, because parts are sorted. Three have defaults: ``alpha`` is ``dirichlet_alpha``,
``num_classes_per_partition`` and ``num_unique_labels_per_partition`` are ``classes_per_client``, and the
``partition_sizes`` of inner-dirichlet are equal.

A partitioner gets the examples in a seeded random order, like the partitions of our own. Some leave out examples; a run
says how many. The vertical partitioners are refused (``fed_dpsat.settings.data``).
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fed_dpsat import plugins
from fed_dpsat.data.natural import coded, column
from fed_dpsat.data.partition import BY, begin, classes, divide
from fed_dpsat.data.parts import disjoint_parts
from fed_dpsat.errors import DataError

SIZE, CLASS, VALUE, NUMBER = "size", "class", "value", "number"
LIBRARY = {
    "continuous": ("ContinuousPartitioner", NUMBER, "Sorted by the numbers of a column plus noise, and cut"),
    "distribution": ("DistributionPartitioner", CLASS, "Each class divided by a row of a given array"),
    "exponential": ("ExponentialPartitioner", SIZE, "Shuffled examples, client i has about e^i"),
    "grouped-natural-id": ("GroupedNaturalIdPartitioner", VALUE, "group_size values of a column for each client"),
    "id-to-size-fnc": ("IdToSizeFncPartitioner", SIZE, "Shuffled examples in sizes by a function of the client"),
    "inner-dirichlet": ("InnerDirichletPartitioner", CLASS, "Given sizes, classes of a client by a Dirichlet draw"),
    "linear": ("LinearPartitioner", SIZE, "Shuffled examples, client i has about i + 1 shares"),
    "natural-id": ("NaturalIdPartitioner", VALUE, "One client for each value of a column, as in natural"),
    "pathological": ("PathologicalPartitioner", CLASS, "classes_per_client drawn classes for each client"),
    "size": ("SizePartitioner", SIZE, "Shuffled examples in given sizes"),
    "square": ("SquarePartitioner", SIZE, "Shuffled examples, client i has about (i + 1)^2 shares"),
}
"""By name: the class of flwr-datasets, what it divides by, and a line about it."""

FILLED = ("num_partitions", "partition_by", "seed", "shuffle")


def _partition(name: str) -> Callable[..., list[np.ndarray]]:
    class_name, kind, line = LIBRARY[name]

    def deal(
        labels: np.ndarray | None,
        columns: Mapping[str, np.ndarray],
        num_examples: int,
        num_clients: int,
        seed: int,
        partition_by: str = "",
        dirichlet_alpha: float = 0.3,
        classes_per_client: int = 2,
        **arguments: Any,
    ) -> list[np.ndarray]:
        from flwr_datasets import partitioner  # type: ignore[import-untyped]

        order, flwr_seed = begin(num_examples, num_clients, seed)
        by = _values(name, kind, labels, columns, partition_by)
        given = {
            "alpha": dirichlet_alpha,
            "num_classes_per_partition": classes_per_client,
            "num_unique_labels_per_partition": classes_per_client,
            **({"partition_sizes": _even(num_examples, num_clients)} if kind == CLASS else {}),
            **_converted(arguments),
            **dict(zip(FILLED, (num_clients, BY, flwr_seed, False), strict=True)),
        }
        class_ = getattr(partitioner, class_name)
        taken = inspect.signature(class_).parameters
        _check_arguments(name, taken, arguments, given)
        try:
            # natural-id draws a progress bar; what examples are left out the run says
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                parts = divide(class_(**{key: given[key] for key in taken if key in given}), order, by)
        except (ValueError, TypeError, AssertionError) as error:
            said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise DataError(
                f"partition={name!r}: {class_name} of flwr-datasets refuses: {said}; change num_clients or arguments"
            ) from error
        if len(parts) != num_clients:
            raise DataError(
                f"partition={name!r} makes {len(parts)} clients with these arguments, not num_clients={num_clients}; "
                f"set num_clients={len(parts)}, or change its arguments"
            )
        whole = disjoint_parts(parts, num_clients=num_clients, num_examples=num_examples, partition=name)
        return [np.sort(part) for part in whole]

    deal.__name__ = name.replace("-", "_")
    deal.__doc__ = f"{line}: {class_name} of flwr-datasets."
    return deal


def _values(
    name: str, kind: str, labels: np.ndarray | None, columns: Mapping[str, np.ndarray], partition_by: str
) -> np.ndarray | None:
    """``[N]``: what a partitioner divides by; classes and values as numbers from 0, which all of them take."""
    if kind == SIZE:
        return None
    if kind == NUMBER:
        numbers = column(columns, partition_by, name)
        if numbers.dtype.kind not in "iuf":
            raise DataError(
                f"partition={name!r} needs numbers, and the column {partition_by!r} is {numbers.dtype}; choose another"
            )
        return numbers
    if kind == VALUE or partition_by:
        return coded(columns, partition_by, name)[1]
    return np.unique(classes(labels, name), return_inverse=True)[1]


def _even(num_examples: int, num_clients: int) -> list[int]:
    return [len(part) for part in np.array_split(np.empty(num_examples), num_clients)]


def _converted(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` of a configuration as a partitioner takes them: a function by its name, an array as a list."""
    found = dict(arguments)
    if isinstance(function := found.get("partition_id_to_size_fn"), str):
        found["partition_id_to_size_fn"] = plugins.load("partition", function)
    if "distribution_array" in found:
        found["distribution_array"] = np.asarray(found["distribution_array"])
    return found


def _check_arguments(
    name: str, taken: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Raise ``DataError`` for an argument that the class does not take, or that is missing."""
    own = [key for key in taken if key not in FILLED]
    if wrong := sorted(arguments.keys() - own):
        near = difflib.get_close_matches(wrong[0], own, n=1) or own
        raise DataError(f"partition={name!r} takes no {wrong[0]!r} by partition_args; it takes {', '.join(near)}")
    missing = [key for key in own if taken[key].default is inspect.Parameter.empty and key not in given]
    if missing:
        raise DataError(f"partition={name!r} needs {missing[0]!r}; give it by partition_args")


PARTITIONS = {name: _partition(name) for name in LIBRARY}
