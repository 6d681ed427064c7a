"""check_dataset passes what ships and catches each broken one."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.digits import digits
from fed_dpsat.testing import check_dataset


def rows(seed, count=20, **changes):
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(
        Examples(inputs=inputs, labels=torch.arange(count) % 2, mean=(0.0,) * 3, std=(1.0,) * 3), **changes
    )


def made(train=None, test=None, class_names=("a", "b")):
    return Dataset(
        name="made",
        train=rows(0) if train is None else train,
        test=rows(1) if test is None else test,
        class_names=class_names,
    )


def missing():
    inputs = rows(1).inputs
    inputs[7, 1] = torch.nan
    return made(test=rows(1, inputs=inputs))


counter = itertools.count()
labels = torch.zeros(20, dtype=torch.int64)
BROKEN = {
    "examples alone": (lambda: rows(0), "is_a_dataset_of_two_splits"),
    "no test split": (lambda: made(test=rows(1, count=0)), "is_a_dataset_of_two_splits"),
    "one class": (lambda: made(rows(0, labels=labels), rows(1, labels=labels), ("a",)), "is_a_dataset_of_two_splits"),
    "missing values": (missing, "batches_are_finite"),
    "other rows each time": (lambda: made(rows(next(counter)), rows(-1)), "each_call_gives_the_same_examples"),
    "other constants": (lambda: made(rows(0, mean=(float(next(counter)),) * 3)), "each_call_gives_the_same_examples"),
    "test on training": (lambda: made(rows(0), rows(0)), "test_split_is_not_the_training_split"),
}


def test_what_ships_conforms():
    assert len(check_dataset(digits)) == 4
    assert len(check_dataset(made)) == 4


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_data_set_is_caught(what, caught):
    factory, check = BROKEN[what]
    assert caught(check_dataset, factory) == check
