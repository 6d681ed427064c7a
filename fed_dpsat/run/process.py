"""Settings of a training process: its allocator, and the garbage collection of its imports."""

from __future__ import annotations

import atexit
import ctypes
import gc
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD = -3, -1, -2


def tune_allocator() -> bool:
    """Let glibc keep up to 2 GiB of freed blocks; False for another C library.

    By default glibc returns large blocks to the system and faults them in again in each step. This call has the effect
    of the variables ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_TOP_PAD_``. Call it before the
    first large allocation.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    accepted = [mallopt(M_MMAP_THRESHOLD, 1 << 30), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 256 << 20)]
    return all(accepted)


@contextmanager
def first_imports() -> Iterator[None]:
    """Import without garbage collection, and leave what was made out of later collections: modules stay to the end.

    Collections, the one at the exit of Python among them, took a quarter of the processor time of these imports. In a
    process that has torch already, nothing is done.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)
