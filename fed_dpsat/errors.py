"""Errors that say what to do, each one line and an exit code on the command line; and warnings that appear once."""

from __future__ import annotations

import errno
import functools
import logging
import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """An input is invalid, and the command has not started its work; exit code 2."""


class RunError(RuntimeError):
    """A run cannot continue; its finished rounds stay on disk; exit code 1."""


class SettingError(InputError):
    """A setting outside its bounds: its name, its value, the bound, and the remedy, on one line."""

    def __init__(self, name: str, value: object, bound: str, remedy: str) -> None:
        super().__init__(f"{name}={value!r} is not {bound}; {remedy}")
        self.name = name
        self.value = value


class DataError(InputError):
    """A data set or a partition is invalid or unavailable; the message gives a remedy."""


class ModelError(InputError):
    """A network that cannot be built or cannot be trained privately."""


@functools.cache
def warn_once(message: str) -> None:
    """Log ``message`` as a warning, once in a process."""
    logging.getLogger("fed_dpsat").warning("%s", message)


OTHERS = (os.path.dirname(__file__), *(sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")))
"""Folders of code that a user did not write."""


def place(error: BaseException) -> str:
    """``" (FILE, line N)"``, the innermost frame outside this library and installed packages; empty without one."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(("<", *(folder + os.sep for folder in OTHERS))):
            return f" ({os.path.basename(frame.filename)}, line {frame.lineno})"
    return ""


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` on writing ``path`` into a ``RunError`` with a remedy."""
    try:
        yield
    except OSError as error:
        remedy = "free space" if error.errno in FULL else "make its folder writable"
        raise RunError(f"cannot write {path}: {error.strerror}; {remedy}, then `fed-dpsat resume` the run") from error
