"""The tested releases of Flower, the warning about another release, and the error for a missing internal."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger

import flwr

from fed_dpsat.errors import InputError

log = getLogger("fed_dpsat")

TESTED = ("1.41", "1.42")
"""Minor releases, oldest first."""


class FlowerError(InputError):
    """An internal of Flower that this package uses is missing: its name, and the releases that have it."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"flwr {flwr.__version__} has no {name}, which fed_dpsat needs; "
            f"it was tested with {' and '.join(TESTED)}: pip install 'flwr=={TESTED[-1]}.*'"
        )


@contextmanager
def internals() -> Iterator[None]:
    """Around imports from inside Flower: raises ``FlowerError`` for a missing name."""
    try:
        yield
    except ImportError as error:
        if not str(error.name).startswith("flwr"):
            raise
        name = re.match(r"cannot import name '(\w+)'", str(error))
        raise FlowerError(f"{error.name}.{name[1]}" if name else str(error.name)) from error


@functools.cache
def say_untested() -> None:
    """Log, once in a process, that the installed Flower is not a tested release."""
    installed, oldest, newest = map(_release, (flwr.__version__, TESTED[0], TESTED[-1]))
    if installed > newest:
        said = f"newer than {TESTED[-1]}, the newest"
    elif not installed:
        said = f"of an unknown release; {TESTED[-1]} is the newest"
    elif installed < oldest:
        said = f"older than {TESTED[0]}, the oldest"
    else:
        return
    log.warning(
        "flwr %s is %s that was tested; if something fails: pip install 'flwr==%s.*'",
        *(flwr.__version__, said, TESTED[-1]),
    )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor; the rest of a version breaks nothing."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
