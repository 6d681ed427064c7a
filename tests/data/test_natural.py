import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_dpsat.data.natural import natural
from fed_dpsat.errors import DataError

WRITERS = np.array(["eve", "bob", "ann", "bob", "eve", "bob", "dan", "bob"])  # ann 1, bob 4, dan 1, eve 2


def dealt(values, num_clients, seed=0, partition_by="writer"):
    return [part.tolist() for part in natural({"writer": values}, len(values), num_clients, seed, partition_by)]


@pytest.mark.parametrize("seed", [0, 1])
def test_with_as_many_clients_as_values_client_i_is_the_i_th_value(seed):
    assert dealt(WRITERS, 4, seed) == [[2], [1, 3, 5, 7], [6], [0, 4]]


def test_with_fewer_clients_the_largest_value_goes_first_and_each_to_the_smallest_client():
    assert dealt(WRITERS, 2) == [[1, 3, 5, 7], [0, 2, 4, 6]]
    assert sorted(map(len, dealt(WRITERS, 3))) == [2, 2, 4]
    assert dealt(WRITERS, 1) == [list(range(8))]


def test_values_of_one_size_are_dealt_by_the_seed():
    hospitals = np.arange(40) % 20
    first, second = dealt(hospitals, 5, 0), dealt(hospitals, 5, 1)
    assert first != second
    assert first == dealt(hospitals, 5, 0)
    assert [len(part) for part in first] == [8] * 5


@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=60), data=st.data())
def test_no_value_is_divided_and_the_largest_client_has_at_most_four_thirds_of_a_bound(values, data):
    values = np.array(values)
    sizes = np.unique(values, return_counts=True)[1]
    num_clients = data.draw(st.integers(1, len(sizes)))
    parts = dealt(values, num_clients)
    assert sorted(itertools.chain(*parts)) == list(range(len(values)))
    holders = [set(values[part]) for part in parts]
    assert all(holders)
    assert sum(map(len, holders)) == len(sizes)
    # in any division some client holds the largest value, one the mean, and one two of the largest num_clients + 1
    largest_first = np.sort(sizes)[::-1]
    two = largest_first[num_clients - 1 : num_clients + 1].sum()
    least = max(largest_first[0], -(-len(values) // num_clients), two)
    assert max(map(len, parts)) <= 4 / 3 * least + 1e-9


def test_more_clients_than_values_are_an_error_with_the_number_of_values():
    with pytest.raises(DataError, match=r"num_clients=5 is more than the 4 values of .*'writer'.*\[1, 4\]"):
        dealt(WRITERS, 5)


@pytest.mark.parametrize(
    ("columns", "name", "message"),
    [
        ({"writer": WRITERS, "age": WRITERS}, "hospital", r"partition_by='hospital' is not .*there are writer, age"),
        ({"writer": WRITERS, "age": WRITERS}, "writers", r"did you mean writer\? there are writer, age"),
        (
            {"writer": WRITERS},
            "",
            r"partition_by='' is not a column .*'natural' needs one; there are writer",
        ),
        (
            {},
            "writer",
            r"for your own files set user_column='writer'; in Python give Examples its columns",
        ),
        ({"writer": np.ones((8, 2))}, "writer", r"column 'writer' is float64 \[8, 2\]"),
        ({"writer": np.array(["a", 1] * 4, dtype=object)}, "writer", r"'writer' mixes types .*; convert it to text"),
    ],
)
def test_a_column_that_cannot_be_used_is_an_error(columns, name, message):
    with pytest.raises(DataError, match=message):
        natural(columns, 8, 2, 0, partition_by=name)


@pytest.mark.parametrize(
    "values",
    [
        np.array([1.0, np.nan, 2.0]),
        np.array(["a", None, "b"], dtype=object),
        np.array(["a", float("nan"), "b"], dtype=object),
        np.array(["a", "", "b"]),
        np.array(["2026-01-01", "NaT", "2026-01-02"], dtype="datetime64[D]"),
    ],
)
def test_an_example_without_a_value_is_an_error(values):
    """All of them would be one client."""
    with pytest.raises(DataError, match=r"column 'writer' has no value for 1 of 3 training examples, the first is 1"):
        dealt(values, 2)
