"""What is put aside is disjoint from what trains, and the test split is gone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.digits import digits
from fed_dpsat.data.validation import hold_out, hold_out_of_each
from fed_dpsat.errors import DataError


def numbered(start, count):
    """Examples that are told apart by their one pixel."""
    inputs = torch.arange(start, start + count, dtype=torch.float32).view(-1, 1, 1)
    return Examples(inputs=inputs, labels=torch.arange(count) % 2, mean=(0.0,), std=(1.0,))


DATASET = Dataset(name="numbers", train=numbered(0, 20), test=numbered(100, 5), class_names=("even", "odd"))


def pixels(examples):
    return set(examples.inputs.flatten().int().tolist())


def test_the_two_parts_are_the_training_split_and_nothing_of_the_test_split():
    held = hold_out(DATASET, 0.25, seed=3)
    assert (len(held.train), len(held.test)) == (15, 5)
    assert pixels(held.train) | pixels(held.test) == set(range(20))
    assert not pixels(held.train) & pixels(held.test)
    assert all(torch.equal(e.labels, e.inputs.flatten().long() % 2) for e in (held.train, held.test))


def test_a_seed_decides():
    assert pixels(hold_out(DATASET, 0.25, 3).test) == pixels(hold_out(DATASET, 0.25, 3).test)
    assert pixels(hold_out(DATASET, 0.25, 3).test) != pixels(hold_out(DATASET, 0.25, 4).test)


@pytest.mark.parametrize("share", [0.01, 0.99, 1.0])
def test_a_share_that_leaves_nothing_is_an_error(share):
    with pytest.raises(DataError, match=f"validation_share={share:g} of the 20 training examples of numbers"):
        hold_out(DATASET, share, 0)


def test_normalisation_and_order_stay():
    whole = digits()
    held = hold_out(whole, 0.1, 0)
    assert (held.train.mean, held.test.std) == (whole.train.mean, whole.train.std)
    rows = [int((whole.train.inputs == x).flatten(1).all(1).nonzero()[0]) for x in held.train.inputs[:50]]
    assert rows == sorted(rows)


def test_the_scale_of_numbers_stays():
    numbers = Examples(inputs=torch.zeros(8, 1), labels=torch.arange(8.0), mean=(0.0,), std=(1.0,))
    whole = Dataset(name="numbers", train=numbers, test=numbers, label_scale=((3.5, 2.0),))
    assert hold_out(whole, 0.25, 0).label_scale == ((3.5, 2.0),)


def test_each_example_is_held_out_by_the_coin_of_its_place():
    """One example less, with the others in their places, changes one of the two parts, and that by itself alone."""
    part = np.arange(0, 40, 2)
    trained, held = (both[0] for both in hold_out_of_each([part], 0.4, np.random.default_rng(3), 40))
    assert sorted([*trained, *held]) == part.tolist()
    assert len(held)
    for out in part:
        less = hold_out_of_each([part[part != out]], 0.4, np.random.default_rng(3), 40)
        for whole, rest in zip((trained, held), (both[0] for both in less), strict=True):
            assert rest.tolist() == [one for one in whole if one != out]


def test_a_client_that_holds_out_all_is_refused():
    with pytest.raises(DataError, match="leaves client 1, with 1 examples, nothing to train on"):
        hold_out_of_each([np.arange(30), np.array([31])], 0.9, np.random.default_rng(0), 32)


def test_without_a_share_partitions_stay_as_they_are():
    part = np.arange(3)
    trained, held = hold_out_of_each([part], 0.0, np.random.default_rng(0), 3)
    assert trained[0] is part
    assert not len(held[0])
