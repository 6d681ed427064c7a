"""A partition is taken as it is, or refused in one line: epsilon is about clients that share no example."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch

from fed_dpsat.client.build import Experiment
from fed_dpsat.data.parts import disjoint_parts
from fed_dpsat.errors import DataError
from fed_dpsat.settings.config import RunConfig

TEN = {"num_clients": 2, "num_examples": 10, "partition": "mine"}


def everybody_has_all(labels, num_clients):
    return [np.arange(len(labels))] * num_clients


def a_third_unused(labels, num_clients):
    return np.array_split(np.arange(2 * len(labels) // 3), num_clients)


def that_shuffles_its_labels(labels, num_clients):
    labels[:] = labels[::-1].copy()
    return np.array_split(np.arange(len(labels)), num_clients)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([np.arange(10)] * 2, "example 0 is in parts 0 and 1"),
        ([[0, 1, 1], [2]], "example 1 is twice in part 0"),
        ([[0, 1], []], "part 1 is empty"),
        ([[0, 1], [2, 10]], r"part 1 holds 10, not in \[0, 10\)"),
        ([[0, 1], [2, -1]], r"part 1 holds -1, not in \[0, 10\)"),
        ([[0, 1], np.array([2, 2**64 - 1], dtype=np.uint64)], r"part 1 holds 18446744073709551615, not in \[0, 10\)"),
        ([[0], [1], [2]], "made 3 parts, not num_clients=2"),
        ([[0]], "made 1 parts, not num_clients=2"),
        ([], "made 0 parts, not num_clients=2"),
        (None, "made a NoneType"),
        (3, "made a int"),
        ({0: [0], 1: [1]}, "made a dict"),
        ([np.arange(10) < 5, np.arange(10) >= 5], r"part 0 is bool \[10\].*np.flatnonzero"),
        ([[True, False], [False, True]], r"part 0 is bool \[2\].*np.flatnonzero"),
        ([np.array([0.0, 1.0]), [2]], r"part 0 is float64 \[2\].*astype"),
        ([["0"], [1]], r"part 0 is <U1 \[1\]"),
        ([[[0, 1]], [2]], r"part 0 is int64 \[1, 2\]"),
        ([[[0, 1], [2]], [3]], "part 0 is not an array"),
        ([0, 1], r"part 0 is int64 \[\]"),
        ([np.array([0, 1], dtype="m8[s]"), [2]], r"part 0 is timedelta64\[s\] \[2\]"),
        ([[0, 2**70], [1]], r"part 0 is object \[2\]"),
        ([np.ma.MaskedArray([0, 1], mask=[False, True]), [2]], r"part 0 is a masked.*compressed"),
        (np.ma.MaskedArray([[0, 1], [2, 3]], mask=[[False, False], [False, True]]), r"part 1 is a masked.*compressed"),
    ],
)
def test_what_is_no_partition_is_refused_in_one_line(parts, said):
    with pytest.raises(DataError, match=f"^partition='mine':? {said}") as refused:
        disjoint_parts(parts, **TEN)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 5], [9, 2]],
        ((0, 5), range(9, 1, -7)),
        [np.array([0, 5], dtype=np.uint8), np.array([9, 2], dtype=np.int32)],
        np.array([[0, 5], [9, 2]]),
        (part for part in ([0, 5], [9, 2])),
        [torch.tensor([0, 5]), torch.tensor([9, 2])],
    ],
)
def test_whole_numbers_of_any_kind_become_int64_in_their_order(parts):
    first, second = disjoint_parts(parts, **TEN)
    assert first.dtype == second.dtype == np.int64
    assert first.tolist() == [0, 5]
    assert second.tolist() == [9, 2]


class Lying(np.ndarray):
    """Says that it has two examples, and has four."""

    def __len__(self):
        return 2


def test_a_subclass_of_arrays_is_taken_by_the_numbers_it_holds():
    (part,) = disjoint_parts([np.arange(4).view(Lying)], num_clients=1, num_examples=4, partition="mine")
    assert type(part) is np.ndarray
    assert part.tolist() == [0, 1, 2, 3]


def test_what_a_partition_holds_on_to_changes_nothing_afterwards():
    mine = np.arange(4)
    (part,) = disjoint_parts([mine], num_clients=1, num_examples=4, partition="mine")
    mine[:] = 0
    assert part.tolist() == [0, 1, 2, 3]


def test_a_million_examples_of_a_hundred_thousand_clients():
    order = np.random.default_rng(0).permutation(1_000_000)
    parts = np.array_split(order, 100_000)
    found = disjoint_parts(parts, num_clients=100_000, num_examples=1_000_000, partition="mine")
    assert all(np.array_equal(a, b) for a, b in zip(found, parts, strict=True))
    parts[-1][-1] = parts[0][0]
    with pytest.raises(DataError, match=rf"example {parts[0][0]} is in parts 0 and 99999"):
        disjoint_parts(parts, num_clients=100_000, num_examples=1_000_000, partition="mine")


def own(function, **changes):
    return RunConfig(
        **{"noise_multiplier": 1.0, "num_clients": 5, "partition": f"{__name__}:{function.__name__}"} | changes
    )


def test_no_epsilon_is_computed_for_clients_that_share_examples():
    """Five clients with all examples, full batches: the ledger says 5.773 for two rounds, and right is 16.10."""
    with pytest.raises(DataError, match="example 0 is in parts 0 and 1"):
        Experiment.build(own(everybody_has_all, sample_rate=1.0, num_rounds=2, delta=1e-4))


def test_an_experiment_cannot_be_given_parts_that_overlap():
    experiment = Experiment.build(RunConfig(noise_multiplier=1.0, num_clients=2))
    with pytest.raises(DataError, match="is in parts 0 and 1"):
        dataclasses.replace(experiment, partitions=[experiment.partitions[0]] * 2)


def test_a_partition_that_writes_into_its_labels_changes_no_data():
    plain = Experiment.build(RunConfig(noise_multiplier=1.0, num_clients=5))
    found = Experiment.build(own(that_shuffles_its_labels))
    assert torch.equal(found.dataset.train.labels, plain.dataset.train.labels)


def test_what_is_in_no_part_is_said(tmp_path, caplog):
    from fed_dpsat.simulation import simulate

    with caplog.at_level(logging.WARNING):
        summary = simulate(own(a_third_unused, num_rounds=1), tmp_path / "run")
    total = len(Experiment.build(own(a_third_unused)).dataset.train)
    unused = total - 2 * total // 3
    assert summary["unused_examples"] == unused
    assert f"{unused} of {total} training examples are in no part" in caplog.text
    caplog.clear()
    assert simulate(RunConfig(noise_multiplier=1.0, num_rounds=1), tmp_path / "all")["unused_examples"] == 0
    assert "in no part" not in caplog.text
