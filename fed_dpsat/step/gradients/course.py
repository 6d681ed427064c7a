"""Whether a pass is the one that was tried out: the same functions in the same order, with the same plain arguments.

What is known of a module, from made-up examples, is known of the operations that it did on them. A module may branch on
how many examples there are, on the value of a parameter or on what it kept; then it does others on real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

ABOUT = frozenset(
    {"size", "dim", "numel", "__len__", "is_floating_point", "is_complex", "is_contiguous", "stride", "element_size"}
    | {"nelement", "is_signed", "has_names"}
)
"""Methods that say something about a tensor and nothing of its numbers."""

TENSORS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag", "grad"})
"""Attributes of tensors that are tensors."""

CONTAINERS = (tuple, list, torch.Size)
PLAIN = (float, bool, str, complex, type(None), torch.dtype, type(Ellipsis))


class Course:
    """The functions that one pass called, their whole numbers, and their other plain arguments."""

    def __init__(self) -> None:
        self.functions: list[object] = []
        self.whole: list[int] = []
        self.others: list[object] = []

    def note(self, func: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        """One call; what only asks about a tensor is left out."""
        name = getattr(func, "__name__", "")
        if name in ABOUT or (name == "__get__" and func.__self__.__name__ not in TENSORS):  # type: ignore[attr-defined]
            return
        self.functions.append(func)
        self._arguments(args)
        if kwargs:
            self.others.extend(kwargs)
            self._arguments(kwargs.values())

    def _arguments(self, args: Iterable[Any]) -> None:
        for value in args:
            kind = type(value)
            if kind is int:
                self.whole.append(value)
            elif kind in CONTAINERS:
                self.whole.append(len(value))
                self._arguments(value)
            elif kind is slice:
                self._arguments((value.start, value.stop, value.step))
            elif kind in PLAIN:
                self.others.append(value)


class Expected:
    """The course of passes of any size, of those with 2 and with 3 examples; whole numbers are linear in the size."""

    def __init__(self, two: Course, three: Course) -> None:
        self.two = two
        self.slopes = [b - a for a, b in zip(two.whole, three.whole, strict=False)]
        self.same = self.holds(three, 3)

    def holds(self, course: Course, batch: int) -> bool:
        """Whether ``course`` is that of a pass with ``batch`` examples."""
        beyond = batch - 2
        return (
            course.functions == self.two.functions
            and course.others == self.two.others
            and course.whole == [a + beyond * slope for a, slope in zip(self.two.whole, self.slopes, strict=True)]
        )
