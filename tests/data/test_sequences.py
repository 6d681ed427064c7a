"""Sequences of different length, and examples that are trees of arrays."""

import numpy as np
import pytest
import torch

from fed_dpsat.data import Dataset, Examples
from fed_dpsat.data.dataset import check_plain
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import DataError

TEXTS = [[5, 6, 7], [], [1], [2, 3]]


def sequences(texts=TEXTS, **change):
    offsets = torch.tensor([0, *np.cumsum([len(text) for text in texts])])
    values = torch.tensor([token for text in texts for token in text], dtype=torch.int16)
    given = {"values": values, "offsets": offsets, "max_length": 3, "vocabulary_size": 8, "padding": 4} | change
    return Sequences(**given)


def test_a_batch_is_padded_with_a_mask():
    found = sequences(max_length=3).padded("input_ids", torch.tensor([3, 1, 2]))
    assert found["input_ids"].tolist() == [[2, 3, 4], [4, 4, 4], [1, 4, 4]]
    assert found["attention_mask"].tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert {t.dtype for t in found.values()} == {torch.int64}


@pytest.mark.parametrize(("rows", "shape"), [([], [0, 8]), ([1], [1, 8]), ([0, 0], [2, 8])])
def test_a_batch_is_never_shorter_than_the_first_step(rows, shape):
    found = sequences(max_length=100).padded("note", torch.tensor(rows, dtype=torch.int64))
    assert [list(t.shape) for t in found.values()] == [shape, shape]
    assert list(found) == ["note", "note_mask"]


def test_rows_are_those_sequences_in_that_order():
    picked = sequences().rows(torch.tensor([3, 0, 1]))
    assert picked.offsets.tolist() == [0, 2, 5, 5]
    assert picked.values.tolist() == [2, 3, 5, 6, 7]


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_raises(index):
    with pytest.raises(IndexError):
        sequences().padded("input_ids", torch.tensor([index]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(6)}, "float32"),
        ({"offsets": torch.tensor([0, 3, 2, 4, 6])}, "do not rise"),
        ({"offsets": torch.tensor([0, 3, 3, 4, 7])}, "do not rise from 0 to 6"),
        ({"max_length": 2}, "sequence 0 has 3 values, more than max_length=2"),
        ({"padding": 8}, r"padding=8 is not in \[0, vocabulary_size=8\)"),
        ({"mask_token": 8}, r"mask_token=8 is not in \[0, vocabulary_size=8\); .* -1 for none"),
        ({"mask_token": -2}, "mask_token=-2"),
        ({"max_length": 0, "offsets": torch.zeros(3, dtype=torch.int64)}, "max_length=0 is not at least 1"),
    ],
)
def test_sequences_are_checked_where_they_are_made(change, message):
    with pytest.raises(DataError, match=message):
        sequences(**change)


def test_the_first_value_outside_is_named_with_its_row():
    with pytest.raises(DataError, match=r"token 6 in row 0 is not in \[0, 6\)"):
        sequences().check_within(6, "token")
    held = sequences(values=torch.tensor([5, -100, 0, 1, 2, 3]))
    held.check_within(6, "label", ignored=True)
    for values, ignored in (([5, -100, 0, 1, 2, 3], False), ([5, -1, 0, 1, 2, 3], True)):
        with pytest.raises(DataError, match=r"label -1(00)? in row 0 is not in \[0, 6\)"):
            sequences(values=torch.tensor(values)).check_within(6, "label", ignored=ignored)


def test_a_bound_above_the_largest_of_a_type_is_no_other_number():
    held = sequences(values=torch.tensor([0, 255, 7, 1, 2, 3], dtype=torch.uint8))
    for bound in (256, 300, 70_000):
        held.check_within(bound, "token")
    with pytest.raises(DataError, match=r"token 255 in row 0 is not in \[0, 255\)"):
        held.check_within(255, "token")


def texts(**change):
    given = {"inputs": {"input_ids": sequences()}, "labels": torch.tensor([0, 1, 0, 1])} | change
    return Examples(**given)


def test_the_text_itself_is_a_label_without_a_loss_on_padding():
    inputs, targets = texts(labels=None).batch(torch.tensor([2, 0]))
    assert inputs["input_ids"].tolist() == [[1, 4, 4], [5, 6, 7]]
    assert targets.tolist() == [[1, -100, -100], [5, 6, 7]]


@pytest.mark.parametrize(("max_length", "steps"), [(1, [1]), (8, [8]), (9, [8, 9]), (33, [8, 12, 16, 24, 32, 33])])
def test_a_sequence_has_a_padded_length_of_its_own(max_length, steps):
    lengths = list(range(max_length + 1))
    made = sequences([[1] * n for n in lengths], max_length=max_length)
    expected = [next(step for step in steps if step >= n) for n in lengths]
    assert made.padded_lengths(torch.arange(len(lengths))).tolist() == expected


def test_examples_of_one_padded_length_are_a_group():
    made = texts(inputs={"input_ids": sequences([[1] * n for n in (9, 2, 12, 0)], max_length=20)})
    indices = torch.tensor([3, 0, 1, 2])
    groups = made.alike(indices)
    assert [indices[group].tolist() for group in groups] == [[3, 1], [0, 2]]
    assert [made.batch(indices[group])[0]["input_ids"].shape[1] for group in groups] == [8, 12]
    assert [group.tolist() for group in made.alike(torch.arange(0))] == [[]]


def test_several_inputs_are_a_dictionary():
    examples = texts(
        inputs={
            "input_ids": sequences(),
            "picture": torch.full((4, 1, 2, 2), 51, dtype=torch.uint8),
            "age": torch.arange(4, dtype=torch.float32)[:, None],
            "site": torch.tensor([[3], [2], [1], [0]], dtype=torch.int16),
        }
    )
    inputs, labels = examples.batch(torch.tensor([3, 0]))
    assert sorted(inputs) == ["age", "attention_mask", "input_ids", "picture", "site"]
    torch.testing.assert_close(inputs["picture"], torch.full((2, 1, 2, 2), 0.2))
    assert inputs["age"].tolist() == [[3.0], [0.0]]
    assert inputs["site"].tolist() == [[0], [3]]
    assert inputs["site"].dtype == torch.int64
    assert labels.tolist() == [1, 0]


def test_rows_keep_every_part_together():
    examples = texts(columns={"writer": np.array(["a", "b", "c", "d"])})
    picked = examples.rows(torch.tensor([2, 1]))
    assert picked.columns["writer"].tolist() == ["c", "b"]
    assert picked.labels.tolist() == [0, 1]
    assert picked.leaves["input_ids"].lengths.tolist() == [1, 0]


def test_several_labels_are_numbers_in_a_batch():
    examples = Examples(inputs=torch.tensor([[1], [2]]), labels=torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8))
    inputs, targets = examples.batch(torch.tensor([1]))
    assert inputs.tolist() == [[2]]
    assert targets.dtype == torch.float32
    assert targets.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (torch.tensor([0, 1, 0, 2]), ("a", "b"), r"label 2 of row 3 is not in \[0, 2\)"),
        (torch.full((4, 2), 2, dtype=torch.uint8), ("a", "b"), r"label 2 of row 0 is not in \[0, 2\)"),
        (torch.zeros(4, 2), ("a",), "2 columns for 1 class_names"),
        (sequences(), ("a", "b"), r"train label 5 in row 0 is not in \[0, 2\)"),
        (torch.zeros(4, 0), (), r"labels are torch.float32 \[4, 0\], without a number"),
        (torch.tensor([0.0, 1.0, float("nan"), 2.0]), (), "label of row 2 is NaN or infinite"),
        (torch.tensor([[0.0, 1.0], [0.0, float("inf")]] * 2), ("a", "b"), "label of row 1 is NaN or infinite"),
    ],
)
def test_a_label_outside_the_names_is_refused(labels, names, message):
    def made():
        return Dataset(name="made", train=texts(labels=labels), test=texts(labels=labels), class_names=names)

    with pytest.raises(DataError, match=message):
        made()


def test_a_token_outside_the_vocabulary_is_refused_before_a_client_meets_it():
    wrong = texts(inputs={"input_ids": sequences([[5, 6, 7], [], [1], [2, 8]])})
    for train, test, split in ((wrong, texts(), "train"), (texts(), wrong, "test")):
        with pytest.raises(DataError, match=rf"made: {split} input_ids 8 in row 3 is not in \[0, 8\)"):
            Dataset(name="made", train=train, test=test, class_names=("a", "b"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": sequences([[1, 1, 1], [], [1], [1]])}, "text of row 3 has 2 positions, and its labels have 1"),
        ({"labels": sequences([[1, 1, 1], [], [1], [1, 1, 1]])}, "text of row 3 has 2 positions.*have 3"),
        ({"inputs": torch.zeros(4, 3, dtype=torch.int64), "labels": sequences()}, "needs a text; make the input Seq"),
        ({"inputs": {"input_ids": sequences(), "attention_mask": torch.ones(4, 3)}}, "'attention_mask' is the mask"),
        ({"inputs": {"note": sequences(), "note_mask": torch.ones(4, 3)}}, "'note_mask' is the mask"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        texts(**change)


@pytest.mark.parametrize("scale", [((0.0, 0.0),), ((0.0,),), (0.0, 1.0), ((0.0, "a"),), ((float("nan"), 1.0),), 5])
def test_a_scale_is_a_mean_and_a_std_for_each_number(scale):
    examples = texts(labels=torch.zeros(4))
    with pytest.raises(DataError, match=r"label_scale=.* is not one finite mean and one std"):
        Dataset(name="made", train=examples, test=examples, label_scale=scale)
    assert Dataset(name="made", train=examples, test=examples, label_scale=((1, 2.0),)).label_scale == ((1, 2.0),)


def test_splits_of_another_form_are_refused():
    other = texts(inputs={"input_ids": sequences(vocabulary_size=9)})
    with pytest.raises(DataError, match=r"train input_ids are sequences of at most 3, 8 tokens.*9 tokens"):
        Dataset(name="made", train=texts(), test=other, class_names=("a", "b"))


def test_sequences_of_another_class_are_refused():
    class Own(Sequences):
        pass

    own = Own(**vars(sequences()))
    dataset = Dataset(name="made", train=texts(inputs={"input_ids": own}), test=texts(), class_names=("a", "b"))
    with pytest.raises(DataError, match=r"input_ids of class 'Own'"):
        check_plain(dataset)
    check_plain(Dataset(name="made", train=texts(), test=texts(), class_names=("a", "b")))
