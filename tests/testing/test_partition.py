"""check_partition passes what ships and catches each broken one."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from fed_dpsat import plugins
from fed_dpsat.testing import ConformanceError, check_partition


def cut(labels, num_clients, seed):
    return np.array_split(np.random.default_rng(seed).permutation(len(labels)), num_clients)


def beyond(labels, num_clients, seed):
    return [part + 1 for part in cut(labels, num_clients, seed)]


def shuffling(labels, num_clients, seed):
    np.random.default_rng(seed).shuffle(labels)
    return cut(labels, num_clients, seed)


def sorting_a_column(labels, columns, num_clients):
    columns["number"].sort()
    return cut(labels, num_clients, 0)


def overlapping(labels, num_clients, seed):
    return [np.arange(len(labels))] * num_clients


def with_an_empty_client(labels, num_clients, seed):
    first, *others = cut(labels, num_clients, seed)
    return [np.concatenate([first, *others[:1]]), *([np.arange(0)] if others else []), *others[1:]]


BROKEN = {
    "one part too few": (lambda labels, num_clients: cut(labels, num_clients + 1, 0)[2:], "gives_one_part_per_client"),
    "masks": (lambda labels, num_clients, seed: [np.ones(len(labels), bool)] * num_clients,
              "parts_are_places_in_the_training_split"),
    "shares": (lambda labels, num_clients, seed: [p * 1.0 for p in cut(labels, num_clients, seed)],
               "parts_are_places_in_the_training_split"),
    "beyond the end": (beyond, "parts_are_places_in_the_training_split"),
    "all for each": (overlapping, "no_example_is_dealt_twice"),
    "twice in one": (lambda labels, num_clients: [[c, c] for c in range(num_clients)], "no_example_is_dealt_twice"),
    "an empty client": (with_an_empty_client, "no_client_is_empty"),
    "no seed": (lambda labels, num_clients: np.array_split(np.random.permutation(len(labels)), num_clients),
                "the_same_seed_deals_the_same"),
    "a column in place": (sorting_a_column, "labels_and_columns_are_left_alone"),
    "in place": (shuffling, "labels_and_columns_are_left_alone"),
}  # fmt: skip


ARGUMENTS = {
    "continuous": {"partition_by": "number", "strictness": 0.5},
    "distribution": {"distribution_array": np.ones((10, 2)), "preassigned_num_samples_per_label": 1},
    "grouped-natural-id": {"partition_by": "user", "group_size": 4},
    "id-to-size-fnc": {"partition_id_to_size_fn": np.sqrt},
    "natural": {"partition_by": "user"},
    "natural-id": {"partition_by": "user"},
    "size": {"partition_sizes": [100, 50]},
}
CLIENTS = {
    "distribution": (10,),
    "exponential": (1, 2, 4),
    "grouped-natural-id": (5,),
    "natural-id": (20,),
    "size": (2,),
}


@pytest.mark.by_default("iid", "natural", "dirichlet", "size-skew")
@pytest.mark.parametrize("name", plugins.builtin("partition"))
def test_every_shipped_partition_conforms(name):
    factory = functools.partial(plugins.builtin("partition")[name], **ARGUMENTS.get(name, {}))
    assert len(check_partition(factory, num_clients=CLIENTS.get(name, (1, 2, 7)))) == 6


def test_data_without_classes_and_with_columns_of_its_own():
    natural = functools.partial(plugins.load("partition", "natural"), partition_by="ward")
    check_partition(natural, num_examples=9, columns={"ward": np.arange(9) % 4}, num_clients=(4, 3))
    with pytest.raises(ConformanceError, match="are not classes"):
        check_partition(plugins.load("partition", "dirichlet"), num_examples=9)


def test_lists_and_what_is_left_over_are_fine():
    check_partition(lambda labels, num_clients: [[client] for client in range(num_clients)])
    check_partition(functools.partial(cut, seed=1), labels=np.zeros(40, dtype=np.int64), num_clients=(40,))


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_partition_is_caught(what, caught):
    factory, check = BROKEN[what]
    assert caught(check_partition, factory) == check
