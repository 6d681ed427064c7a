import torch

from fed_dpsat.data.digits import _read, digits


def test_sizes_shape_and_classes():
    dataset = digits()
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.input_shape == (1, 8, 8)
    assert dataset.num_classes == 10
    assert dataset.train.inputs.min() == 0
    assert dataset.train.inputs.max() == 1


def test_the_split_is_stratified_fixed_and_loses_nothing():
    from sklearn.datasets import load_digits

    first, second = digits(), digits()
    assert torch.equal(first.test.inputs, second.test.inputs)
    counts = first.test.labels.bincount(minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 37
    rows = torch.cat([first.train.inputs, first.test.inputs]).flatten(1) * 16
    want = torch.from_numpy(load_digits().data)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, want.tolist()))
    assert first.test.labels[:8].tolist() == [9, 2, 5, 7, 6, 9, 7, 3]  # whatever the versions installed


def test_the_constants_normalise():
    dataset = digits()
    rows, _ = dataset.train.batch(torch.arange(len(dataset.train)))
    assert abs(rows.mean()) < 0.01
    assert abs(rows.std() - 1) < 0.01


def test_they_are_those_of_scikit_learn_bit_for_bit():
    from sklearn.datasets import load_digits

    for ours, theirs in zip(_read(), load_digits(return_X_y=True), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours == theirs).all()
