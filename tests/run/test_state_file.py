"""What is written is read again, to the bit; what is no whole state is an error and nothing else."""

import os

import numpy as np
import pytest

from fed_dpsat.errors import RunError
from fed_dpsat.run.state_file import StateError, read_state, write_state

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "nan": np.array([np.nan, -0.0, np.inf], dtype=np.float32),
}


TURNED = np.arange(6, dtype=np.float64).reshape(2, 3).T


CONFIG = {"text": "a\nb", "key": b"\x00\xff", "flags": [True, False], "keys": [b"a", b""], "x": 0.1}
STATE = {"a": ("arrays", {**ARRAYS, "turned": TURNED}), "c": ("config", CONFIG), "m": ("metrics", {"n": [1, 2]})}


def check(found):
    assert {key: kind for key, (kind, _) in found.items()} == {key: kind for key, (kind, _) in STATE.items()}
    assert found["c"][1] == CONFIG
    assert found["m"][1] == {"n": [1, 2]}
    for name, array in STATE["a"][1].items():
        seen = found["a"][1][name]
        assert (seen.dtype, seen.shape, seen.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_what_is_written_is_read_again_to_the_bit(tmp_path):
    write_state(tmp_path / "1.state", STATE)
    check(read_state(tmp_path / "1.state"))
    assert [path.name for path in tmp_path.iterdir()] == ["1.state"]


def test_a_system_that_writes_a_little_at_a_time(tmp_path, monkeypatch):
    whole = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: whole(fd, [bytes(parts[0])[:7]]))
    write_state(tmp_path / "1.state", STATE)
    check(read_state(tmp_path / "1.state"))


def test_what_is_no_whole_state_is_an_error(tmp_path):
    path = tmp_path / "1.state"
    with pytest.raises(StateError, match="disk that all hosts share"):
        read_state(path)
    write_state(path, STATE)
    data = path.read_bytes()
    for end in (0, 5, 40, len(data) - 80):
        path.write_bytes(data[:end])
        with pytest.raises(StateError, match=r"not a client state|cut off"):
            read_state(path)
    path.write_bytes(b"\x80\x02" + data)
    with pytest.raises(StateError, match="not a client state"):
        read_state(path)


def test_a_full_disk_is_an_error_and_leaves_what_was_there(tmp_path, full_disk):
    path = tmp_path / "1.state"
    write_state(path, STATE)
    with full_disk(10_000), pytest.raises(RunError, match=rf"cannot write {path}: File too large; free space, then"):
        write_state(path, {"a": ("arrays", {"large": np.zeros(5_000)})})
    check(read_state(path))
