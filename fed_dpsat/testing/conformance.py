"""A suite: small named checks of one plug-in; the first failure raises an error with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fed_dpsat.errors import place
from fed_dpsat.step.unchecked import unchecked

Subject = TypeVar("Subject")


class ConformanceError(AssertionError):
    """A plug-in failed a check: the suite, the check, the expected and the observed value, and a remedy."""

    def __init__(self, suite: str, check: str, expected: str, seen: str, remedy: str) -> None:
        super().__init__(f"check_{suite}, {check}: expected {expected}; saw {seen}; {remedy}")
        self.suite, self.check = suite, check
        self.expected, self.seen, self.remedy = expected, seen, remedy


class Unmet(Exception):
    """The error of a check; ``run_checks`` adds the name of the check."""

    def __init__(self, expected: str, seen: str, remedy: str) -> None:
        super().__init__(expected, seen, remedy)
        self.expected, self.seen, self.remedy = expected, seen, remedy


def require(condition: object, *, expected: str, seen: str, remedy: str) -> None:
    """Raise ``Unmet`` unless ``condition``."""
    if not condition:
        raise Unmet(expected, seen, remedy)


def run_checks(suite: str, checks: Sequence[Callable[[Subject], None]], subject: Subject) -> list[str]:
    """Run ``checks`` on ``subject`` in order and return their names; the generator of torch stays unchanged.

    The checks of a run are off (``unchecked``), because a suite measures the plug-in itself. Raises
    ``ConformanceError`` for the first failure, and for an exception of the plug-in.
    """
    made = []
    for check in checks:
        name = check.__name__
        try:
            with torch.random.fork_rng(devices=[]), unchecked():
                torch.manual_seed(0)
                check(subject)
        except Unmet as unmet:
            raise ConformanceError(suite, name, unmet.expected, unmet.seen, unmet.remedy) from None
        except Exception as error:
            seen = f"{type(error).__name__}: {error}{place(error)}"
            remedy = "correct the plug-in, which the check calls like a run"
            raise ConformanceError(suite, name, "no exception", seen, remedy) from error
        made.append(name)
    return made
