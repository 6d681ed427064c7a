"""States of clients that train together, of one form: a table with two rows for each client.

A file for each client takes longer than the training of a small one. A table is two files; in each, client c has row c,
so files are sparse. A client's new state overwrites the older of its two, so the state before a round stays until the
next round, also if a process is killed while it writes. Rows are written and read at their offsets by several
processes, each its own clients.

A row has a header (``HEADER``: round, checksum, the client's own history of at most ``EVENTS`` events) and the bytes of
the arrays. The name of a table is the hash of its form.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.accounting.event import KINDS, History, PrivacyEvent
from fed_dpsat.errors import written
from fed_dpsat.run.state_file import StateError

Arrays = Mapping[str, NDArray[Any]]
"""By name, one array of each client: ``[K, ...]``."""

EVENTS = 3
"""Most have one event, or two after the noise of a run was changed; a client with more has a file of its own."""
KIND = "S24"
EVENT = np.dtype([("kind", KIND), ("noise_multiplier", "<f8"), ("sample_rate", "<f8"), ("steps", "<i8")])
HEADER = np.dtype([("round", "<i8"), ("sum", "<u4"), ("events", "<u4"), ("history", EVENT, (EVENTS,)), ("_", "V32")])
"""192 bytes. A row of zeros has no state: rounds are numbered from 1."""

FORM, ROWS = ".form", ".rows"


@dataclass(frozen=True)
class Form:
    """The names, types and shapes of a client's arrays."""

    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, arrays: Arrays) -> Form:
        """That of each client in ``arrays[K, ...]``."""
        return cls(tuple((name, array.dtype.str, tuple(array.shape[1:])) for name, array in arrays.items()))

    @classmethod
    def read(cls, path: Path) -> Form:
        """The form in the file at ``path``."""
        return cls(tuple((name, dtype, tuple(shape)) for name, dtype, shape in json.loads(path.read_text())))

    @cached_property
    def row(self) -> np.dtype[Any]:
        """The type of a row."""
        size = sum(np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in self.arrays)
        return np.dtype([("header", HEADER), ("arrays", np.uint8, (-(-size // 64) * 64,))])

    @cached_property
    def name(self) -> str:
        """A name for files."""
        return blake2b(self.text.encode(), digest_size=8).hexdigest()

    @property
    def text(self) -> str:
        """For a file."""
        return json.dumps([[name, dtype, list(shape)] for name, dtype, shape in self.arrays])


class StateTable:
    """The states of one ``form`` in ``folder``.

    Raises ``RunError`` for a full disk, ``StateError`` for a damaged state.
    """

    def __init__(self, folder: Path, form: Form) -> None:
        self._folder, self.form = folder, form
        self._paths = [folder / f"{form.name}.{side}{ROWS}" for side in (0, 1)]
        self._last: dict[int, tuple[int, int]] = {}  # round and side of the last state that this process has written

    @classmethod
    def all_in(cls, folder: Path) -> list[StateTable]:
        """The tables in ``folder``."""
        return [cls(folder, Form.read(path)) for path in sorted(folder.glob(f"*{FORM}"))]

    def write(
        self, clients: Sequence[int], round: int, before: Sequence[int | None], arrays: Arrays, histories: list[History]
    ) -> None:
        """Store the states of ``clients`` after ``round``; those of the rounds ``before`` stay."""
        sides = [self._older_side(client, last) for client, last in zip(clients, before, strict=True)]
        rows = np.zeros(len(clients), self.form.row)
        flat = rows["arrays"]
        at = 0
        for name, _, _ in self.form.arrays:
            columns = np.ascontiguousarray(arrays[name]).reshape(len(clients), -1).view(np.uint8)
            flat[:, at : at + columns.shape[1]] = columns
            at += columns.shape[1]
        header = rows["header"]
        header["round"] = round
        header["sum"] = [zlib.crc32(one) for one in np.ascontiguousarray(flat)]
        header["events"] = [len(history) for history in histories]
        coded: dict[History, NDArray[Any]] = {}
        for history in set(histories):
            coded[history] = np.zeros(EVENTS, EVENT)
            for i, event in enumerate(history):
                coded[history][i] = event.kind, event.noise_multiplier, event.sample_rate, event.steps
        header["history"] = [coded[history] for history in histories]
        path = self._folder / f"{self.form.name}{FORM}"
        with written(path):
            if not path.exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(f".{os.getpid()}")
                temporary.write_text(self.form.text)
                os.replace(temporary, path)
        for side in (0, 1):
            mine = [i for i, chosen in enumerate(sides) if chosen == side]
            if not mine:
                continue
            with written(self._paths[side]), _opened(self._paths[side], os.O_RDWR | os.O_CREAT) as file:
                for first, last in _runs([clients[i] for i in mine]):
                    _write(file, rows[mine[first:last]], clients[mine[first]])
        self._last.update((client, (round, side)) for client, side in zip(clients, sides, strict=True))

    def read(self, client: int, round: int) -> tuple[dict[str, NDArray[Any]], History] | None:
        """The arrays and the history of ``client`` after ``round``; None if this table has no such state."""
        side = self._side_of(client, round)
        if side is None:
            return None
        (row,) = self._rows(side, client)
        flat = row["arrays"]
        if zlib.crc32(flat) != row["header"]["sum"]:
            raise StateError(f"{self._paths[side]}: the state of client {client} is damaged; start a new run")
        arrays, at = {}, 0
        for name, dtype, shape in self.form.arrays:
            count = math.prod(shape)
            arrays[name] = np.frombuffer(flat, dtype, count, at).reshape(shape)
            at += count * np.dtype(dtype).itemsize
        return arrays, _history(row["header"])

    def rounds(self, up_to: int) -> dict[int, int]:
        """By client, the last round up to ``up_to`` with a state here."""
        found: dict[int, int] = {}
        for path in self._paths:
            count = path.stat().st_size // self.form.row.itemsize if path.exists() else 0
            if not count:  # a process that was killed may leave a part of a row at the end
                continue
            rounds = np.array(np.memmap(path, self.form.row, "r", shape=(count,))["header"]["round"])
            for client in np.flatnonzero((rounds > 0) & (rounds <= up_to)).tolist():
                found[client] = max(found.get(client, 0), int(rounds[client]))
        return found

    def _older_side(self, client: int, before: int | None) -> int:
        """The side whose state of ``client`` is not that of the round ``before``."""
        if before is None:
            return 0
        known, side = self._last.get(client, (None, None))
        if known != before:  # another process may have written since
            side = self._side_of(client, before)
        return 0 if side is None else 1 - side

    def _side_of(self, client: int, round: int) -> int | None:
        for side in (0, 1):
            rows = self._rows(side, client, HEADER.itemsize)
            if len(rows) and rows[0]["header"]["round"] == round:
                return side
        return None

    def _rows(self, side: int, client: int, size: int = 0) -> NDArray[Any]:
        """The row of ``client``, or the first ``size`` bytes of it; no row if the file has none."""
        whole = self.form.row.itemsize
        try:
            with _opened(self._paths[side], os.O_RDONLY) as file:
                data = os.pread(file, size or whole, client * whole)
        except FileNotFoundError:
            data = b""
        if len(data) < (size or whole):
            return np.zeros(0, self.form.row)
        return np.frombuffer(data.ljust(whole, b"\0"), self.form.row)


def _history(header: Any) -> History:
    return tuple(
        PrivacyEvent(
            kind=event["kind"].decode(),
            noise_multiplier=float(event["noise_multiplier"]),
            sample_rate=float(event["sample_rate"]),
            steps=int(event["steps"]),
        )
        for event in header["history"][: header["events"]]
    )


def _runs(clients: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of consecutive numbers."""
    start = 0
    for i in range(1, len(clients) + 1):
        if i == len(clients) or clients[i] != clients[i - 1] + 1:
            yield start, i
            start = i


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags)
    try:
        yield file
    finally:
        os.close(file)


def _write(file: int, rows: NDArray[Any], first: int) -> None:
    data = memoryview(rows.tobytes())
    at = first * rows.dtype.itemsize
    while data:
        count = os.pwrite(file, data, at)
        data, at = data[count:], at + count


assert all(len(kind) <= np.dtype(KIND).itemsize for kind in KINDS)
