"""A strict reader of arrays from a network: no header causes an allocation, an evaluation or an unpickling.

Flower's ``Array.numpy()`` is ``np.load(..., allow_pickle=False)``: no pickle, but a header of a few bytes may claim any
shape. Here the caller knows names, shapes and types, and the bytes must match them.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.lib import format as npy
from numpy.typing import NDArray

from fed_dpsat.flower.wire.compat import SType

LARGEST_HEADER = 1024


def read_array(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values of ``array``, read-only, without a copy; ``ValueError`` unless they are ``dtype[shape]``."""
    raw, size = array.data, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    wanted = f"{dtype}{list(shape)}"
    if array.stype != SType.NUMPY or not size <= len(raw) <= size + LARGEST_HEADER:
        raise ValueError(f"has {len(raw)} bytes of {str(array.stype)[:40]!r}, not those of {wanted}")
    stream = io.BytesIO(raw[: LARGEST_HEADER + 16])
    try:
        if npy.read_magic(stream) != (1, 0):
            raise ValueError("another version")
        said, fortran, kind = npy.read_array_header_1_0(stream, max_header_size=LARGEST_HEADER)
    except Exception as error:  # the parser of Python literals raises any of several errors
        raise ValueError(f"is no array ({type(error).__name__}), expected {wanted}") from None
    length = len(raw) - stream.tell()
    if said != shape or kind != dtype or (fortran and len(shape) > 1) or length != size:
        raise ValueError(f"is {kind}{list(said)} in {length} bytes, not {wanted}")
    return np.frombuffer(raw, dtype=dtype, offset=stream.tell()).reshape(shape)
