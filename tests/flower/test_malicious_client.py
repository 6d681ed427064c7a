"""A client that lies about its arrays is dropped by name; it cannot make the server allocate, unpickle or stop."""

from __future__ import annotations

import io
import pickle
import sys

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fed_dpsat.flower.wire import records


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("a pickle was loaded",))


def raw(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (2,), stype: str = "numpy.ndarray") -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (63 - (10 + len(text)) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + b"\0" * 8


LIES = {
    "10^18 numbers by the header": raw(header("(1000000000000000000,)")),
    "10 GB by the header": raw(header("(2500000000,)")),
    "a shape that is a call": raw(header("__import__('os').getpid()")),
    "a pickle": raw(pickle.dumps(Bomb())),
    "a pickle by type": raw(pickle.dumps(Bomb()), stype="pickle"),
    "objects": raw(npy(np.zeros(2, dtype=np.float32)).replace(b"'<f4'", b"'|O' ")),
    "another type than it says": raw(npy(np.zeros(2, dtype=np.float64))),
    "50 MB too many": raw(npy(np.zeros(2, dtype=np.float32)) + b"\0" * 50_000_000),
    "nothing": raw(b""),
    "half": raw(npy(np.zeros(2, dtype=np.float32))[:-4]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_a_dropped_client(federation, lie):
    def tamper(client, round, content):
        if client == 2:
            content[records.ARRAYS] = ArrayRecord({"w": LIES[lie]})
        return content

    made = federation(tamper).run(1)
    assert made.reports[1].accepted == [0, 1, 3]
    assert made.reports[1].dropped[2].startswith("w ")


def test_what_is_honest_is_read_as_it_is(federation):
    def tamper(client, round, content):
        values = content[records.ARRAYS]["w"].numpy()
        content[records.ARRAYS] = ArrayRecord({"w": Array(values)})  # as it comes over a network
        return content

    assert (federation(tamper).run(1).models[1] == federation().run(1).models[1]).all()
