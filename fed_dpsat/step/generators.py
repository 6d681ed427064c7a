"""The generators that any code can reach by itself: torch's, those of Python's ``random`` and of ``numpy.random``.

A model may draw from any of them, as may an optimizer or a function that makes batches. While a client trains they are
seeded, and afterwards they are as their owner left them. Beside the generators of Python and numpy, whose states take
longer to copy than a small model to train, stand twins that are asked for a number whenever they are: who else drew
from them shows in the next one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.step import placement


class _Twins:
    """Of Python's and numpy's generators, while those are ``held``; ``idle`` if nobody minds where they stand."""

    def __init__(self) -> None:
        self.held = self.idle = False
        self.python, self.numpy = random.Random(), np.random.RandomState()

    def seed(self, value: int) -> None:
        random.seed(value)
        self.python.seed(value)
        words = [value >> shift & 0xFFFFFFFF for shift in range(0, max(32, value.bit_length()), 32)]
        np.random.seed(words)
        self.numpy.seed(words)

    def set(self, states: tuple[Any, Any]) -> None:
        _set_states(states)
        self.python.setstate(states[0])
        self.numpy.set_state(states[1])

    def apart(self) -> bool:
        return (
            random.getrandbits(64) != self.python.getrandbits(64)
            or np.random.random_sample() != self.numpy.random_sample()
        )

    def together(self) -> None:
        _set_states((self.python.getstate(), self.numpy.get_state()))

    def follow(self) -> None:
        self.python.setstate(random.getstate())
        self.numpy.set_state(np.random.get_state())


_twins = _Twins()


def _forked(device: torch.device) -> AbstractContextManager[None]:
    if not placement.is_card(device):
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


@contextmanager
def borrowed(device: torch.device) -> Iterator[None]:
    """All generators, torch's of the CPU and of ``device`` too, are afterwards as they were before.

    Inside of another one or of ``kept`` it does nothing: who draws sets back what was drawn (``Mark``), or uses
    ``kept``. That costs less inside of this one.
    """
    if _twins.held:
        yield
        return
    states = _states()
    _twins.held = _twins.idle = True
    try:
        with _forked(device):
            _twins.seed(0)
            yield
    finally:
        _twins.held = _twins.idle = False
        _set_states(states)


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """All generators are afterwards as they were before, wherever this is; inside they may be seeded."""
    with borrowed(device), _forked(device):
        idle, _twins.idle = _twins.idle, False
        states = None if idle else _states()
        _twins.follow()  # within another one somebody may have drawn, such as Flower for a sample of nodes
        try:
            yield
        finally:
            _twins.idle = idle
            if states:
                _twins.set(states)


@contextmanager
def training_on(device: torch.device) -> Iterator[None]:
    """``placement.exact`` and ``kept``."""
    with placement.exact(device), kept(device):
        yield


@contextmanager
def returned() -> Iterator[None]:
    """Those of Python and numpy are afterwards as they were before; nothing is seeded."""
    states = _states()
    try:
        yield
    finally:
        _set_states(states)


def seed(device: torch.device, value: int) -> None:
    """Set all generators, inside of ``kept``."""
    placement.seed(device, value & (2**63 - 1))
    _twins.seed(value)


def others_moved() -> bool:
    """Whether anyone has drawn from ``random`` or ``numpy.random``, inside of ``kept``; then they are set back."""
    if moved := _twins.apart():
        _twins.together()
    return moved


@dataclass(frozen=True)
class Mark:
    """Where the generators stood; to be asked once."""

    device: torch.device
    states: tuple[Tensor, ...]
    others: Any

    @classmethod
    def here(cls, device: torch.device) -> Mark:
        """Now."""
        return cls(device, placement.generator_states(device), None if _twins.held else _states())

    def moved(self) -> bool:
        """Whether anyone has drawn since; then the generators are set back."""
        now = placement.generator_states(self.device)
        drawn = any(a.numpy().tobytes() != b.numpy().tobytes() for a, b in zip(now, self.states, strict=True))
        if drawn:
            placement.rewind(self.device, self.states)
        if self.others is None:
            return others_moved() or drawn
        if apart := _differ(self.others, _states()):
            _set_states(self.others)
        return drawn or apart


def _states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set_states(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])


def _differ(first: tuple[Any, Any], second: tuple[Any, Any]) -> bool:
    arrays = zip(first[1], second[1], strict=True)
    return first[0] != second[0] or any(bool(np.any(a != b)) for a, b in arrays)
