"""Which releases of Flower were tested, and what is said of another one and of what is missing in it."""

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
    """Something inside Flower that this package touches is not there: its name, and the releases that have it."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"flwr {flwr.__version__} has no {name}, which fed_dpsat needs; "
            f"it was tested with {' and '.join(TESTED)}: pip install 'flwr=={TESTED[-1]}.*'"
        )


@contextmanager
def internals() -> Iterator[None]:
    """Around imports from inside Flower: raises ``FlowerError`` for what is missing there."""
    try:
        yield
    except ImportError as error:
        if not str(error.name).startswith("flwr"):
            raise
        name = re.match(r"cannot import name '(\w+)'", str(error))
        raise FlowerError(f"{error.name}.{name[1]}" if name else str(error.name)) from error


@functools.cache
def say_untested() -> None:
    """Log, once in a process, that the installed Flower is newer or older than what was tested."""
    installed = _release(flwr.__version__)
    for tested, beyond, what in ((TESTED[-1], 1, "newer"), (TESTED[0], -1, "older")):
        difference = (installed > _release(tested)) - (installed < _release(tested))
        if difference == beyond:
            log.warning(
                "flwr %s is %s than %s, the %sest that was tested; if something fails, pip install 'flwr==%s.*'",
                *(flwr.__version__, what, tested, what.removesuffix("er"), tested),
            )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor: what is behind them breaks nothing."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
