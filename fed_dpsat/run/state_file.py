"""The file of a client's state: a line with the format, a line of JSON, and the bytes of the arrays.

``torch.save`` packs an archive with a checksum, which takes a millisecond for a few numbers and several for a model.
Reading executes no code. A truncated or missing file raises ``StateError``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fed_dpsat.errors import RunError, written

Record = tuple[str, Mapping[str, Any]]
"""A kind, ``ARRAYS`` or another, and its values by name: arrays, or values of JSON and bytes."""

SUFFIX = ".state"
MAGIC = b"fed_dpsat state 2\n"
ALIGNED = 64
"""Every array starts at a multiple of this number of bytes."""
BYTES = "bytes"
ARRAYS = "arrays"


class StateError(RunError):
    """The state of a client is missing or damaged."""


def write_state(path: Path, state: Mapping[str, Record]) -> None:
    """Replace the file at ``path`` atomically, and create its folder. Raises ``RunError``."""
    header: list[Any] = []
    arrays: list[np.ndarray[Any, Any]] = []
    for key, (kind, items) in state.items():
        if kind == ARRAYS:
            header.append([key, kind, [[name, a.dtype.str, a.shape] for name, a in items.items()]])
            arrays += [np.ascontiguousarray(a) for a in items.values()]
        else:
            header.append([key, kind, [[name, _plain(value)] for name, value in items.items()]])
    text = MAGIC + json.dumps(header).encode() + b"\n"
    temporary = path.with_suffix(".tmp")
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb", buffering=0) as file:
            _write_all(file.fileno(), _aligned([text, *(a.reshape(-1).view(np.uint8).data for a in arrays)]))
        os.replace(temporary, path)


def read_state(path: Path) -> dict[str, Record]:
    """The state in the file at ``path``; arrays are read-only. Raises ``StateError``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StateError(f"no client state at {path}; put the run folder on a disk that all hosts share") from None
    text_end = data.find(b"\n", len(MAGIC)) + 1
    if not data.startswith(MAGIC) or not text_end:
        raise StateError(f"{path} is not a client state of this version; start a new run, or use that version")
    state: dict[str, Record] = {}
    at = _next(text_end)
    for key, kind, items in json.loads(data[len(MAGIC) : text_end]):
        if kind != ARRAYS:
            state[key] = kind, {name: _value(plain) for name, plain in items}
            continue
        arrays = {}
        for name, dtype, shape in items:
            count = math.prod(shape)
            end = at + count * np.dtype(dtype).itemsize
            if end > len(data):
                raise StateError(f"{path} is cut off at byte {len(data)}; restore it, or start a new run")
            arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
            at = _next(end)
        state[key] = kind, arrays
    return state


def _aligned(parts: list[Any]) -> list[Any]:
    """``parts`` with zero bytes between them, so that each starts at a multiple of ``ALIGNED``."""
    filled = []
    for part in parts:
        filled += [part, b"\0" * (_next(len(part)) - len(part))]
    return [part for part in filled if len(part)]


def _next(at: int) -> int:
    return -(-at // ALIGNED) * ALIGNED


def _write_all(descriptor: int, parts: list[Any]) -> None:
    """Write all ``parts``; one call to the system takes a limited number and may write a part of them."""
    while parts:
        written = os.writev(descriptor, parts[:512])
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if written:
            parts[0] = memoryview(parts[0])[written:]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {BYTES: value.hex()} if isinstance(value, bytes) else value


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(item) for item in plain]
    return bytes.fromhex(plain[BYTES]) if isinstance(plain, dict) else plain
