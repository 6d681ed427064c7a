import numpy as np
import pytest
import torch

from fed_dpsat.data import DataError, Dataset, Examples


def make(inputs, labels=None, mean=(0.5,), std=(0.25,)):
    labels = torch.zeros(len(inputs), dtype=torch.int64) if labels is None else labels
    return Examples(inputs=inputs, labels=labels, mean=mean, std=std)


def test_uint8_is_scaled_to_0_1_and_then_normalised_per_channel():
    inputs = torch.tensor([[0, 255], [255, 51]], dtype=torch.uint8).view(2, 2, 1, 1)
    examples = make(inputs, torch.tensor([3, 4]), mean=(0.5, 0.0), std=(0.25, 0.1))
    rows, labels = examples.batch(torch.tensor([1, 0, 1]))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.flatten(1), torch.tensor([[2.0, 2.0], [-2.0, 10.0], [2.0, 2.0]]))
    assert labels.tolist() == [4, 3, 4]


def test_float32_is_normalised_as_it_is_and_left_unchanged():
    inputs = torch.tensor([[1.0], [0.0]])
    examples = make(inputs)
    torch.testing.assert_close(examples.batch(torch.tensor([0, 1]))[0], torch.tensor([[2.0], [-2.0]]))
    assert inputs.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_empty_index_gives_the_empty_batch(dtype):
    rows, labels = make(torch.zeros(3, 1, 2, 2, dtype=dtype)).batch(torch.empty(0, dtype=torch.int64))
    assert rows.shape == (0, 1, 2, 2)
    assert rows.dtype == torch.float32
    assert labels.shape == (0,)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_that_is_no_row_is_an_error(index):
    with pytest.raises(IndexError):
        make(torch.zeros(3, 1)).batch(torch.tensor([index]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(2, 1, dtype=torch.float64)}, "float64"),
        ({"inputs": torch.zeros(2)}, r"inputs are torch.float32 \[2\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"'inputs': 2, 'labels': 3.*differ"),
        ({"labels": torch.zeros(2, dtype=torch.float64)}, "labels are torch.float64"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, r"labels are torch.int64 \[2, 3\]"),
        ({"labels": None}, "the label is the one text"),
        ({"columns": {"site": np.zeros(3)}}, "column 'site'.*differ"),
        ({"inputs": {}}, "no array"),
        ({"inputs": (torch.zeros(2, 1),) * 2}, "inputs are a tuple.*give a dict of arrays; its keys are the arguments"),
        ({"inputs": {"a": np.zeros(2)}, "mean": (), "std": ()}, "a are a ndarray, not a tensor; convert them with"),
        ({"labels": np.zeros(2, np.int64)}, "labels are a ndarray, not a tensor; convert them with torch.as_tensor"),
        ({"mean": (0.0, 0.0)}, "1 channels"),
        ({"mean": (), "std": ()}, r"mean=\(0.0,\) \* 1, std=\(1.0,\) \* 1 leave the inputs unscaled"),
        ({"inputs": torch.zeros(2, 3, dtype=torch.uint8)}, r"std=\(1.0,\) \* 3 leave the inputs in 0..1"),
        ({"inputs": torch.zeros(2, 3, dtype=torch.int64)}, "0 channels; leave them out"),
        ({"mean": (float("nan"),)}, "mean must be finite"),
        ({"std": (0.0,)}, r"\(0, inf\)"),
        ({"std": (float("nan"),)}, r"\(0, inf\)"),
    ],
)
def test_examples_are_checked_where_they_are_made(change, message):
    given = {"inputs": torch.zeros(2, 1), "labels": torch.zeros(2, dtype=torch.int64), "mean": (0.5,), "std": (0.25,)}
    with pytest.raises(DataError, match=message):
        Examples(**(given | change))


def test_rows_are_examples_in_the_order_asked_for():
    examples = Examples(inputs=torch.arange(4.0).view(4, 1), labels=torch.arange(4), mean=(0.5,), std=(2.0,))
    found = examples.rows(torch.tensor([2, 0]))
    assert found.inputs.flatten().tolist() == [2.0, 0.0]
    assert found.labels.tolist() == [2, 0]
    assert (found.mean, found.std) == ((0.5,), (2.0,))


def test_dataset_knows_its_classes_and_its_shape():
    examples = make(torch.zeros(2, 1, 4, 5), torch.tensor([0, 2]))
    dataset = Dataset(name="d", train=examples, test=examples, class_names=("a", "b", "c"))
    assert (dataset.num_classes, dataset.input_shape, len(dataset.train)) == (3, (1, 4, 5), 2)


def test_dataset_refuses_a_label_without_a_class():
    good, bad = (make(torch.zeros(2, 1), torch.tensor([0, last])) for last in (1, 2))
    with pytest.raises(DataError, match=r"d: test label 2 of row 1 is not in \[0, 2\)"):
        Dataset(name="d", train=good, test=bad, class_names=("a", "b"))


def test_dataset_refuses_splits_of_two_shapes():
    with pytest.raises(DataError, match="train inputs are"):
        Dataset(name="d", train=make(torch.zeros(2, 1, 3)), test=make(torch.zeros(2, 1, 4)), class_names=("a",))
