import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpsat.data.partition import PARTITIONS, dirichlet, iid, shards, size_skew
from fed_dpsat.errors import DataError

NAMES = sorted(PARTITIONS)
BALANCED = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))


def dealt(name, labels, num_clients, seed, **own):
    by_class = name in ("dirichlet", "shards")
    return PARTITIONS[name](labels if by_class else len(labels), num_clients, seed, **own)


def assert_is_partition(parts, num_clients, num_examples):
    assert len(parts) == num_clients
    assert all(len(part) for part in parts)
    assert all(part.dtype == np.int64 and np.array_equal(part, np.sort(part)) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_parts_are_disjoint_complete_non_empty_and_repeatable(name, data):
    labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=40)))
    own, most = {}, len(labels)
    if name == "dirichlet":
        own["dirichlet_alpha"] = data.draw(st.floats(1e-3, 1e3))
    if name == "shards":
        own["classes_per_client"] = data.draw(st.integers(1, len(set(labels.tolist()))))
        most //= own["classes_per_client"]
    if name == "size-skew":
        own["size_skew"] = data.draw(st.floats(0, 5))
    num_clients, seed = data.draw(st.integers(1, most)), data.draw(st.integers(0, 2**32))
    parts = dealt(name, labels, num_clients, seed, **own)
    assert_is_partition(parts, num_clients, len(labels))
    for part, again in zip(parts, dealt(name, labels, num_clients, seed, **own), strict=True):
        np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_who_gets_what(name):
    first, second = (dealt(name, BALANCED, 10, seed) for seed in (0, 1))
    assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_clients_share_fifty_thousand_examples(name):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5_000))
    own = {"dirichlet_alpha": 0.1} if name == "dirichlet" else {}
    assert_is_partition(dealt(name, labels, 1_000, 0, **own), 1_000, 50_000)


@pytest.mark.parametrize("name", NAMES)
def test_one_client_holds_everything_and_one_example_each_is_the_most(name):
    own = {"classes_per_client": 1} if name == "shards" else {}
    labels = np.array([0, 1, 1, 0, 2])
    assert dealt(name, labels, 1, 0, **own)[0].tolist() == [0, 1, 2, 3, 4]
    assert [len(part) for part in dealt(name, labels, 5, 0, **own)] == [1] * 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_clients", [0, -1, 4])
def test_more_clients_than_examples_or_none_are_an_error(name, num_clients):
    with pytest.raises(DataError, match=rf"num_clients={num_clients} is not in \[1, 3\]"):
        dealt(name, np.array([0, 1, 2]), num_clients, 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3), r"labels are float64 \[3\]"),
        (np.zeros((3, 1), dtype=np.int64), r"labels are int64 \[3, 1\]"),
        (np.zeros(0, dtype=np.int64), r"num_clients=1 is not in \[1, 0\]"),
    ],
)
def test_labels_that_are_none_are_an_error(labels, message):
    with pytest.raises(DataError, match=message):
        dirichlet(labels, 1, 0)


@pytest.mark.parametrize("divide", [dirichlet, shards])
def test_labels_that_are_no_classes_are_an_error_with_the_partitions_that_need_none(divide):
    with pytest.raises(DataError, match=r"not classes; choose natural \(by a column\), iid or size-skew"):
        divide(None, 2, 0)


def test_a_negative_seed_is_an_error():
    with pytest.raises(DataError, match="seed=-1"):
        iid(3, 1, -1)


def test_iid_is_even():
    assert sorted(len(part) for part in iid(7, 3, 0)) == [2, 2, 3]


def test_dirichlet_is_even_at_a_high_alpha():
    parts = dirichlet(BALANCED, 10, 0, dirichlet_alpha=1e6)
    counts = np.array([np.bincount(BALANCED[part], minlength=10) for part in parts])
    assert counts.min() >= 8
    assert counts.max() <= 12


def test_dirichlet_gives_whole_classes_at_a_low_alpha_and_one_example_to_the_empty():
    parts = dirichlet(BALANCED, 50, 0, dirichlet_alpha=1e-4)
    sizes = sorted(len(part) for part in parts)
    assert sizes[:40] == [1] * 40
    assert sum(size > 90 for size in sizes) >= 5


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e7])
def test_dirichlet_refuses_an_alpha_that_is_none(alpha):
    with pytest.raises(DataError, match=rf"dirichlet_alpha={alpha} is not in \(0, 1e\+06\]"):
        dirichlet(BALANCED, 2, 0, dirichlet_alpha=alpha)


@pytest.mark.parametrize("classes_per_client", [1, 2, 5, 10])
def test_shards_hold_at_most_so_many_classes_where_shards_and_classes_fit(classes_per_client):
    parts = shards(BALANCED, 10, 0, classes_per_client=classes_per_client)
    assert [len(part) for part in parts] == [100] * 10
    assert max(len(set(BALANCED[part])) for part in parts) <= classes_per_client


def test_shards_left_over_go_to_small_clients_that_hold_the_class():
    labels = np.repeat(np.arange(2), 5)  # 10 examples, 4 shards of 2, 2 left over
    for seed in range(20):
        parts = shards(labels, 4, seed, classes_per_client=1)
        assert_is_partition(parts, 4, 10)
        assert max(len(part) for part in parts) <= 4
    even = shards(np.zeros(10, dtype=np.int64), 4, 0, classes_per_client=1)
    assert sorted(len(part) for part in even) == [2, 2, 3, 3]


def test_shards_left_over_of_a_class_that_nobody_holds_are_not_lost():
    labels = np.array([0, 0, 0, 0, 1])  # the one example of class 1 may be the one left over
    for seed in range(20):
        assert_is_partition(shards(labels, 2, seed, classes_per_client=2), 2, 5)


@pytest.mark.parametrize("classes_per_client", [0, 11])
def test_shards_refuse_a_number_of_classes_that_is_none(classes_per_client):
    with pytest.raises(DataError, match=rf"classes_per_client={classes_per_client} is not in \[1, 10\]"):
        shards(BALANCED, 2, 0, classes_per_client=classes_per_client)


def test_shards_refuse_more_shards_than_examples():
    with pytest.raises(DataError, match="makes 6 shards, more than the 4 examples"):
        shards(np.array([0, 1, 0, 1]), 3, 0, classes_per_client=2)


@pytest.mark.parametrize(
    ("num_examples", "skew", "sizes"),
    [
        (14, 1.0, [7, 4, 3]),  # 1 each, and 11 divided 6 : 3 : 2
        (7, 0.0, [3, 2, 2]),
        (24, 2.0, [16, 5, 3]),  # 1 each, and 21 divided 36 : 9 : 4, which is 15.4, 3.9, 1.7
        (10, 1e3, [8, 1, 1]),
    ],
)
def test_size_skew_follows_its_power_law(num_examples, skew, sizes):
    parts = size_skew(num_examples, 3, 0, size_skew=skew)
    assert [len(part) for part in parts] == sizes


@pytest.mark.parametrize("skew", [-0.1, float("nan"), float("inf")])
def test_size_skew_refuses_an_exponent_that_is_none(skew):
    with pytest.raises(DataError, match=rf"size_skew={skew} is not in \[0, inf\)"):
        size_skew(9, 2, 0, size_skew=skew)
