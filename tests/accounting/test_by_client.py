import numpy as np
import pytest

from fed_dpsat.accounting.by_client import ByClient, check_number, numbers

MAPPING = {5: "b", 1: "a", 9: "b", 0: "".join(["b"])}
PAIRS = [([9, 5], "b"), (np.array([1], dtype=np.uint8), "a"), (range(1), "b")]


@pytest.mark.parametrize("given", [MAPPING, PAIRS, iter(PAIRS)], ids=["mapping", "pairs", "iterator"])
def test_clients_ascend_and_equal_values_are_one(given):
    found = ByClient.of(given).merged()
    assert found.clients.tolist() == [0, 1, 5, 9]
    assert (found.values, found.which.tolist()) == (["b", "a"], [0, 1, 0, 0])  # in the order of first clients
    assert [(clients.tolist(), value) for clients, value in found.groups()] == [([0, 5, 9], "b"), ([1], "a")]
    assert found.to_dict() == MAPPING
    assert [found.get(client) for client in (0, 1, 2, 9, 10)] == ["b", "a", None, "b", None]
    assert found.map(str.upper).to_dict() == {0: "B", 1: "A", 5: "B", 9: "B"}


def test_nobody():
    for given in ({}, [], [([], "a")]):
        found = ByClient.of(given).merged()
        assert (found.to_dict(), list(found.groups()), found.get(0)) == ({}, [], None)
        assert found.beyond(ByClient.of(MAPPING)).to_dict() == {}
        assert found.conflict(ByClient.of(MAPPING)) is None
        assert ByClient.of(MAPPING).beyond(found).to_dict() == MAPPING


def test_what_is_known_already():
    known = ByClient.of({1: "a", 9: "other", 7: "x"})
    asked = ByClient.of(MAPPING)
    assert asked.beyond(known).to_dict() == {0: "b", 5: "b"}
    assert asked.conflict(known) == 9
    assert asked.conflict(ByClient.of({1: "a", 7: "x"})) is None
    assert ByClient.of({3: "b", 2: "a"}).conflict(ByClient.of({3: "a", 2: "b"})) == 2


def test_pairs_of_values():
    found = ByClient.of({0: "a", 1: "b", 2: "a"}).paired(ByClient.of({0: 1, 1: 1, 2: 2}))
    assert found.to_dict() == {0: ("a", 1), 1: ("b", 1), 2: ("a", 2)}


@pytest.mark.parametrize("clients", [[-1], [2**63], [True], ["0"], [1.0], [np.int64(3)], np.array([1.0]), np.eye(2)])
def test_clients_are_numbers(clients):
    with pytest.raises(ValueError, match=r"client=.* is not an int in \[0, 2\*\*63\)"):
        numbers(clients)
    assert numbers(np.array([2**63 - 1], dtype=np.uint64)).tolist() == [2**63 - 1]
    with pytest.raises(ValueError, match="round=-1"):
        check_number("round", -1)
