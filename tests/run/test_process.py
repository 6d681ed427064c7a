import gc
import platform
import subprocess
import sys

import pytest
import torch  # noqa: F401 - see test_first_imports

from fed_dpsat.run import process


def test_first_imports_are_not_collected_and_later_ones_are(monkeypatch):
    before = gc.get_freeze_count()
    with process.first_imports():  # torch is here
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(process.atexit, "register", lambda call: None)
    try:
        with process.first_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(process.ctypes, "CDLL", None)
    assert process.tune_allocator() is False


FAULTS = """
import resource, torch
from fed_dpsat.run.process import tune_allocator

def faults():
    for step in range(25):
        if step == 20:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), tune_allocator(), faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_are_kept():
    """Page faults of five blocks of 64 MiB after twenty; in a process of its own, for it cannot be undone."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True, text=True)
    as_shipped, tuned_it, tuned = done.stdout.split()
    assert tuned_it == "True"
    assert int(tuned) < int(as_shipped) / 10
