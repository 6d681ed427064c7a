"""The file of one client's state: a line that says what it is, a line of JSON, and arrays as they lie in memory.

``torch.save`` would pack an archive with a checksum: a millisecond for a state of a few numbers, several for a model.
Reading runs nothing that a file says. A file that ends early, or is none, is a ``StateError``.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fed_dpsat.errors import RunError
from fed_dpsat.flower import compat

SUFFIX = ".state"
MAGIC = b"fed_dpsat state 1\n"
ALIGNED = 64
"""Bytes that every array begins at a multiple of."""
BYTES = "bytes"
KINDS: dict[str, Any] = {"metrics": MetricRecord, "config": ConfigRecord}


class StateError(RunError):
    """A client's state that is not where it was put, or not as it was."""


def write_state(path: Path, state: RecordDict) -> None:
    """All of it, in the place of what is at ``path``, or nothing."""
    header: list[Any] = []
    arrays: list[np.ndarray[Any, Any]] = []
    for key, record in state.items():
        if isinstance(record, ArrayRecord):
            held = {name: np.ascontiguousarray(compat.view(array)) for name, array in record.items()}
            header.append(
                [key, "arrays", [[name, a.dtype.str, compat.view(record[name]).shape] for name, a in held.items()]]
            )
            arrays += held.values()
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            header.append([key, kind, [[name, _plain(value)] for name, value in record.items()]])
    text = MAGIC + json.dumps(header).encode() + b"\n"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb", buffering=0) as file:
        _write_all(file.fileno(), _aligned([text, *(a.reshape(-1).view(np.uint8).data for a in arrays)]))
    os.replace(temporary, path)


def read_state(path: Path) -> RecordDict:
    """What was written. Raises ``StateError``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StateError(f"no client state at {path}; workers on several hosts need the run folder in common") from None
    text_end = data.find(b"\n", len(MAGIC)) + 1
    if not data.startswith(MAGIC) or not text_end:
        raise StateError(f"{path} is no client state of this version; start a new run, or go on with that version")
    state, at = RecordDict(), _next(text_end)
    for key, kind, items in json.loads(data[len(MAGIC) : text_end]):
        if kind != "arrays":
            state[key] = KINDS[kind]({name: _value(plain) for name, plain in items})
            continue
        arrays = {}
        for name, dtype, shape in items:
            count = math.prod(shape)
            end = at + count * np.dtype(dtype).itemsize
            if end > len(data):
                raise StateError(f"{path} is cut off at byte {len(data)}; restore it, or start a new run")
            arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
            at = _next(end)
        state[key] = compat.record_of(arrays)
    return state


def _aligned(parts: list[Any]) -> list[Any]:
    """``parts`` with what fills the space between them."""
    filled = []
    for part in parts:
        filled += [part, b"\0" * (_next(len(part)) - len(part))]
    return [part for part in filled if len(part)]


def _next(at: int) -> int:
    return -(-at // ALIGNED) * ALIGNED


def _write_all(descriptor: int, parts: list[Any]) -> None:
    """A call takes as many parts as the system lets it, and may write less than it was given."""
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
