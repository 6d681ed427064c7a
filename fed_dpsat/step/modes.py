"""Training and evaluation mode of a module: set for as long as it is used so, whatever mode it came in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(module: object, *, training: bool) -> Iterator[None]:
    """``module.train(training)``; afterwards each of its parts is in the mode that it was in.

    A part that shall stay in evaluation mode says so in a ``train`` method of its own, as ever in torch. What is no
    module has no mode.
    """
    if not isinstance(module, nn.Module):
        yield
        return
    before = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, was in before:
            part.training = was
