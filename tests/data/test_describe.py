"""The numbers of ``fed-dpsat data``: each can be counted by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.describe import Spread, describe
from fed_dpsat.data.sequences import IGNORED, Sequences

PARTS = [np.array([0, 1, 2]), np.array([3])]


def texts(lengths):
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    values = torch.zeros(int(offsets[-1]), dtype=torch.uint8)
    return Sequences(values=values, offsets=offsets, max_length=9, vocabulary_size=256)


def given(labels, class_names=(), **more):
    split = Examples(inputs={"input_ids": texts([0, 1, 2, 3, 9]), "age": torch.zeros(5, 2)}, labels=labels, **more)
    return Dataset(name="notes", train=split, test=split.rows(torch.tensor([4])), class_names=class_names)


def test_a_spread_holds_values_that_are_there():
    assert dataclasses.astuple(Spread.of([5, 1, 4, 2])) == (1, 1, 2, 4, 5)
    assert Spread.of([]) is None


def test_arrays_have_the_shape_of_one_example_and_texts_their_lengths():
    text, age = describe(given(torch.zeros(5, dtype=torch.int64), ("a",)), PARTS, "iid").inputs
    assert (age.name, age.type, age.shape, age.lengths) == ("age", "float32", (2,), {})
    assert (text.type, text.shape, text.vocabulary_size) == ("sequences", (9,), 256)
    assert dataclasses.astuple(text.lengths["train"]) == (0, 1, 2, 3, 9)
    assert text.lengths["test"].median == 9


def test_classes_are_counted_by_split_and_client():
    found = describe(given(torch.tensor([0, 0, 1, 1, 2]), ("a", "b", "c", "d")), PARTS, "mine")
    assert found.labels.kind == "a class"
    assert found.labels.counts["c"] == {"train": 1, "test": 1}
    assert found.labels.counts["b"] == {"train": 2, "test": 0}
    clients = found.clients
    assert clients.counts == [[2, 1, 0, 0], [0, 1, 0, 0]]
    assert (clients.sizes, clients.unused, clients.unheld) == ([3, 1], 1, ("c",))  # nobody has a "d" to hold
    assert (clients.classes.least, clients.classes.most) == (1, 2)


def test_labels_that_are_no_classes():
    several = describe(given(torch.tensor([[1, 0], [1, 1], [0, 0], [0, 0], [1, 0]], dtype=torch.uint8), ("a", "b")),
                       PARTS, "iid")  # fmt: skip
    assert several.labels.counts == {"a": {"train": 3, "test": 1}, "b": {"train": 1, "test": 0}}
    assert several.clients.counts is several.clients.classes is None
    number = describe(given(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])), PARTS, "iid").labels
    assert dataclasses.astuple(number.ranges["number 0"]["train"]) == (1, 2, 3, 4, 5)
    two = describe(given(torch.arange(10.0).view(5, 2), ("cost", "days")), PARTS, "iid").labels
    assert (two.ranges["days"]["train"].least, two.ranges["days"]["test"].most) == (1, 9)
    spoken = dataclasses.replace(texts([0, 1, 2, 3, 9]), values=torch.tensor([0, 1, 1] + 12 * [0]))
    assert describe(given(spoken, ("a", "b")), PARTS, "iid").labels.counts["b"] == {"train": 2, "test": 0}
    spoken = dataclasses.replace(spoken, values=torch.tensor([0, 1, IGNORED] + 12 * [IGNORED]))
    counts = describe(given(spoken, ("a", "b")), PARTS, "iid").labels.counts
    assert counts == {"a": {"train": 1, "test": 0}, "b": {"train": 1, "test": 0}}


def test_a_text_can_be_its_own_label_and_a_split_empty():
    split = Examples(inputs={"input_ids": texts([1, 2, 3, 4])}, labels=None)
    data = Dataset(name="notes", train=split, test=split.rows(torch.arange(0)))
    found = describe(data, PARTS, "iid")
    assert found.labels.kind == "the text itself"
    assert found.inputs[0].lengths["test"] is None


def test_columns_count_their_values_and_examples_without_one():
    columns = {"ward": np.array(["n", "n", "n", "s", "s"]), "age": np.array([3.0, np.nan, 3.0, 4.0, np.nan])}
    data = given(torch.zeros(5, dtype=torch.int64), ("a",), columns=columns)
    found = describe(data, PARTS, "natural", "ward")
    ward, age = found.columns
    assert (ward.type, ward.values, ward.missing, ward.examples.least, ward.examples.most) == ("text", 2, 0, 2, 3)
    assert (age.type, age.values, age.missing, age.examples.most) == ("float64", 2, 2, 2)
    assert (found.clients.called, found.clients.values.most) == (["n", "s"], 1)
    mixed = describe(data, [np.array([0, 3]), np.array([1])], "iid", "ward").clients
    assert (mixed.called, mixed.values.most) == ((), 2)
    assert describe(data, PARTS, "iid").clients.values is None
