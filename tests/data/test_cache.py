import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from fed_dpsat.data import cache
from fed_dpsat.data.cache import cached, cached_parts, fingerprint
from fed_dpsat.errors import DataError

ARRAYS = {"inputs": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "labels": np.array([5, 6])}


def forbidden():
    raise AssertionError("decoded a second time")


def assert_is_arrays(found):
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name].numpy(), array)


def test_what_is_decoded_is_stored_and_not_decoded_again(tmp_path):
    assert_is_arrays(cached(tmp_path / "c", lambda: ARRAYS))
    assert_is_arrays(cached(tmp_path / "c", forbidden))
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_tensors_are_mapped_from_the_file_and_writes_stay_private(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (cached(tmp_path / "c", lambda: ARRAYS) for _ in range(2))
    assert str(tmp_path / "c" / "inputs.npy") in Path("/proc/self/maps").read_text()
    first["inputs"].zero_()
    assert_is_arrays(second)


def test_a_transposed_array_is_stored_in_row_order(tmp_path):
    stored = cached(tmp_path / "c", lambda: {"inputs": ARRAYS["inputs"].transpose(2, 0, 1)})["inputs"]
    assert stored.is_contiguous()
    assert stored.shape == (4, 2, 3)


@pytest.mark.parametrize("name", ["inputs.npy", "labels.npy", "meta.json"])
@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 20), os.unlink], ids=["truncated", "missing"])
def test_a_damaged_cache_is_built_anew(tmp_path, name, damage):
    cached(tmp_path / "c", lambda: ARRAYS)
    damage(tmp_path / "c" / name)
    assert_is_arrays(cached(tmp_path / "c", lambda: ARRAYS))
    assert_is_arrays(cached(tmp_path / "c", forbidden))
    assert os.listdir(tmp_path) == ["c"]


def test_a_folder_without_a_cache_in_it_is_replaced(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "meta.json").write_text("[]")
    assert_is_arrays(cached(tmp_path / "c", lambda: ARRAYS))


def test_a_failed_decode_leaves_nothing_behind(tmp_path):
    def fails():
        raise DataError("row 3")

    with pytest.raises(DataError, match="row 3"):
        cached(tmp_path / "c", fails)
    assert os.listdir(tmp_path) == []


def test_the_second_of_two_racing_processes_uses_the_cache_of_the_first(tmp_path):
    def overtaken():
        cached(tmp_path / "c", lambda: ARRAYS)
        return {name: array * 0 for name, array in ARRAYS.items()}

    assert_is_arrays(cached(tmp_path / "c", overtaken))
    assert os.listdir(tmp_path) == ["c"]


def test_a_cache_dir_that_cannot_be_one_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file', .* cannot be written .*of a run, folder in the policy"):
        cached(tmp_path / "file" / "c", lambda: ARRAYS)


def test_fingerprint_follows_key_path_size_and_mtime(tmp_path):
    file, other = tmp_path / "a", tmp_path / "b"
    for path in (file, other):
        path.write_text("12")
        os.utime(path, (1, 1))
    first = fingerprint({"k": 1}, [file])
    assert first == fingerprint({"k": 1}, [file])
    others = {fingerprint({"k": 2}, [file]), fingerprint({"k": 1}, [other]), fingerprint({"k": 1}, [file, other])}
    file.write_text("123")
    os.utime(file, (1, 1))
    others.add(fingerprint({"k": 1}, [file]))
    file.write_text("12")
    os.utime(file, (2, 2))
    others.add(fingerprint({"k": 1}, [file]))
    assert len(others) == 5
    assert first not in others


def test_fingerprint_feels_another_content_of_the_same_length_and_time(tmp_path):
    """As archives with fixed times leave it: the labels of MNIST are as long when they are corrected."""
    file = tmp_path / "labels"
    file.write_text("12")
    os.utime(file, (1, 1))
    first = fingerprint({}, [file])
    changed = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == changed:  # a file system's clock ticks every few milliseconds
        file.write_text("21")
        os.utime(file, (1, 1))
    assert file.stat().st_mtime_ns == 10**9
    assert fingerprint({}, [file]) != first


def test_fingerprint_feels_the_decoder(tmp_path, monkeypatch):
    first = fingerprint({}, [])
    monkeypatch.setattr(cache, "version", lambda name: "0")
    assert fingerprint({}, []) != first


def test_parts_are_joined_and_each_is_on_disk_before_the_next(tmp_path):
    whole = np.arange(3000, dtype=np.int16).reshape(1000, 3)

    def parts():
        for start in range(0, 1000, 10):
            yield {"a": whole[start : start + 10], "one": whole[start : start + 1, 0]}
        (file,) = tmp_path.rglob("a.npy")
        assert file.stat().st_size > 900 * 3 * 2 - 2**17, "only the file's own buffer is in memory"
        yield {"late": whole[:0]}

    found = cached_parts(tmp_path / "c", parts)
    np.testing.assert_array_equal(found["a"], whole)
    np.testing.assert_array_equal(found["one"], whole[::10, 0])
    assert found["late"].shape == (0, 3)
    np.testing.assert_array_equal(cached_parts(tmp_path / "c", forbidden)["a"], whole)


def test_parts_of_another_form_are_refused_and_leave_nothing(tmp_path):
    for other in (np.zeros((1, 4), np.uint8), np.zeros((1, 3), np.int64)):
        with pytest.raises(ValueError, match=r"a.npy: a part of"):
            cached_parts(tmp_path / "c", lambda other=other: [{"a": np.zeros((1, 3), np.uint8)}, {"a": other}])
    assert os.listdir(tmp_path) == []


def test_a_failure_after_some_parts_leaves_nothing(tmp_path):
    def fails():
        yield ARRAYS
        raise DataError("row 1003")

    with pytest.raises(DataError, match="row 1003"):
        cached_parts(tmp_path / "c", fails)
    assert os.listdir(tmp_path) == []
