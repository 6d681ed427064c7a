"""What is written is read again, to the bit; what is no whole state is an error and nothing else."""

import os

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fed_dpsat.flower import compat
from fed_dpsat.simulation.state_file import StateError, read_state, write_state

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "nan": np.array([np.nan, -0.0, np.inf], dtype=np.float32),
}


TURNED = np.arange(6, dtype=np.float64).reshape(2, 3).T


def state():
    config = ConfigRecord({"text": "a\nb", "key": b"\x00\xff", "flags": [True, False], "keys": [b"a", b""], "x": 0.1})
    return RecordDict({"a": compat.record_of(ARRAYS), "c": config, "m": MetricRecord({"n": [1, 2], "y": 1e-300})})


def test_what_is_written_is_read_again(tmp_path):
    write_state(tmp_path / "1.state", state())
    assert read_state(tmp_path / "1.state") == state()
    assert [path.name for path in tmp_path.iterdir()] == ["1.state"]


def test_arrays_keep_their_bits_and_shapes(tmp_path):
    given = {**ARRAYS, "turned": TURNED}
    write_state(tmp_path / "1.state", RecordDict({"a": compat.record_of(given)}))
    found = read_state(tmp_path / "1.state")["a"]
    for name, array in given.items():
        seen = compat.view(found[name])
        assert (seen.dtype, seen.shape, seen.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_a_system_that_writes_a_little_at_a_time(tmp_path, monkeypatch):
    whole = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: whole(fd, [bytes(parts[0])[:7]]))
    write_state(tmp_path / "1.state", state())
    assert read_state(tmp_path / "1.state") == state()


def test_what_is_no_whole_state_is_an_error(tmp_path):
    path = tmp_path / "1.state"
    with pytest.raises(StateError, match="run folder in common"):
        read_state(path)
    write_state(path, state())
    data = path.read_bytes()
    for end in (0, 5, 40, len(data) - 80):
        path.write_bytes(data[:end])
        with pytest.raises(StateError, match=r"no client state|cut off"):
            read_state(path)
    path.write_bytes(b"\x80\x02" + data)
    with pytest.raises(StateError, match="no client state"):
        read_state(path)
