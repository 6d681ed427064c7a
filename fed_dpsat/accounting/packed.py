"""The clients of a row of the ledger: one number, or the packed list of several.

A packed list is one byte w, which is 1, 2, 4 or 8, and then the differences of the ascending clients, counted from -1,
as unsigned little-endian integers of w bytes: [0, 1, 5] is ``01 01 01 04``. One in sixty clients takes two bytes each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Clients = NDArray[np.int64]

WIDTHS = (1, 2, 4, 8)


def pack(clients: Clients) -> int | bytes:
    """What a row stores for ``clients[n]``, n >= 1, ascending, each once, from 0."""
    if len(clients) == 1:
        return int(clients[0])
    steps = np.concatenate([clients[:1] + 1, clients[1:] - clients[:-1]])
    width = next(width for width in WIDTHS if int(steps.max()) < 256**width)
    return bytes([width]) + steps.astype(f"<u{width}").tobytes()


def size(stored: object) -> int:
    """The number of clients; 0 for a value of another form than ``pack`` returns."""
    if isinstance(stored, bytes):
        valid = stored[:1] and stored[0] in WIDTHS and not (len(stored) - 1) % stored[0]
        return (len(stored) - 1) // stored[0] if valid else 0
    return int(type(stored) is int and 0 <= stored < 2**63)


def unpack(stored: object) -> Clients:
    """The inverse of ``pack``: int64 clients [n]; raises ``ValueError`` for anything that ``pack`` does not return."""
    if not size(stored):
        raise ValueError("its clients are neither a number nor a packed list")
    if not isinstance(stored, bytes):
        return np.array([stored], dtype=np.int64)
    steps = np.frombuffer(stored, dtype=f"<u{stored[0]}", offset=1)
    clients = steps.cumsum(dtype=np.uint64).view(np.int64) - 1  # a sum above 2**63 is negative here
    if len(clients) < 2 or clients[0] < 0 or not (clients[1:] > clients[:-1]).all():
        raise ValueError("its clients are not two or more in ascending order")
    return clients
