"""The door for what is wrong on purpose: tests and audits of rules, mechanisms and samplers that nobody vouches for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OPEN: ContextVar[bool] = ContextVar("unchecked", default=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """Within it, in this thread, factors of a clipping rule are used as they come and no class is refused.

    What an event says is then the word of the classes alone: for a suite that measures them, an audit that is to find
    them broken, or a mechanism of your own that passes ``check_mechanism``.
    """
    before = _OPEN.set(True)
    try:
        yield
    finally:
        _OPEN.reset(before)


def checking() -> bool:
    """Whether what is charged is held to what runs: everywhere but within ``unchecked``."""
    return not _OPEN.get()
