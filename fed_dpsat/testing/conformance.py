"""What a suite is: small named checks of one plug-in; the first that fails raises, and says what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fed_dpsat.step.unchecked import unchecked

Subject = TypeVar("Subject")


class ConformanceError(AssertionError):
    """A plug-in failed a check: its suite and name, what was expected, what was seen, and the remedy."""

    def __init__(self, suite: str, check: str, expected: str, seen: str, remedy: str) -> None:
        super().__init__(f"check_{suite}, {check}: expected {expected}; saw {seen}; {remedy}")
        self.suite, self.check = suite, check
        self.expected, self.seen, self.remedy = expected, seen, remedy


class Unmet(Exception):
    """What a check raises; ``run_checks`` adds its name."""

    def __init__(self, expected: str, seen: str, remedy: str) -> None:
        super().__init__(expected, seen, remedy)
        self.expected, self.seen, self.remedy = expected, seen, remedy


def require(condition: object, *, expected: str, seen: str, remedy: str) -> None:
    """Raise ``Unmet`` unless ``condition``."""
    if not condition:
        raise Unmet(expected, seen, remedy)


def run_checks(suite: str, checks: Sequence[Callable[[Subject], None]], subject: Subject) -> list[str]:
    """Make ``checks`` on ``subject`` in their order and return their names; torch's generator is left as it was.

    A plug-in is taken as it is (``unchecked``): a suite measures what it does. Raises ``ConformanceError`` for the
    first that is not met, and for one in which the plug-in raised.
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
            seen = f"{type(error).__name__}: {error}"
            remedy = "the traceback above says where; the check calls the plug-in as a run would"
            raise ConformanceError(suite, name, "no exception", seen, remedy) from error
        made.append(name)
    return made
