import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpsat.accounting.packed import pack, size, unpack


@pytest.mark.parametrize(
    ("clients", "stored"),
    [
        ([0], 0),
        ([2**63 - 1], 2**63 - 1),
        ([0, 1, 5], "01 01 01 04"),
        ([254, 255], "01 ff 01"),
        ([255, 256], "02 0001 0100"),
        ([3, 70000], "04 04000000 6d110100"),
        ([0, 2**63 - 1], "08 0100000000000000 ffffffffffffff7f"),
    ],
)
def test_a_list_is_packed_as_written_by_hand(clients, stored):
    stored = bytes.fromhex(stored) if isinstance(stored, str) else stored
    assert pack(np.array(clients, dtype=np.int64)) == stored
    assert unpack(stored).tolist() == clients
    assert unpack(stored).dtype == np.int64
    assert size(stored) == len(clients)


@settings(max_examples=50)
@given(st.sets(st.one_of(st.integers(0, 600), st.integers(0, 2**63 - 1)), min_size=1, max_size=20))
def test_unpacking_is_the_inverse(clients):
    assert unpack(pack(np.array(sorted(clients), dtype=np.int64))).tolist() == sorted(clients)


@pytest.mark.parametrize("stored", [None, "3", 3.0, -1, 2**63, True, b"", b"\x03\x01\x01\x01", b"\x02\x01", b"\x01"])
def test_other_values_are_no_clients(stored):
    assert size(stored) == 0
    with pytest.raises(ValueError, match="neither a number nor a packed list"):
        unpack(stored)


@pytest.mark.parametrize(
    "stored",
    [
        "01 01",  # one, which is stored as its number
        "01 01 00",  # twice
        "01 00 01",  # -1
        "08 ffffffffffffffff 0100000000000000",  # 2**64 - 2
        "08 0500000000000000 fdffffffffffffff",  # around 2**64 and back to 1
    ],
)
def test_lists_that_do_not_ascend_from_0_are_invalid(stored):
    with pytest.raises(ValueError, match="two or more in ascending order"):
        unpack(bytes.fromhex(stored))
