"""Encodings of a client's update for the network: functions of noised parameters, which cost no privacy.

============ ==================================================== ====================== =====================
update_codec values                                               bytes a coordinate     error
============ ==================================================== ====================== =====================
fp32         the parameters, as they are                          4                      none
bf16         the change, rounded to 8 bits of mantissa            2                      2^-9 of each change
top-k        the ``update_share`` of largest changes, and indices 8 * update_share       the small ones are 0
random-k     a random ``update_share``, scaled up: unbiased       4 * update_share       variance
============ ==================================================== ====================== =====================

The change is that of all parameters laid end to end. Client, round and attempt determine the coordinates of
``random-k``, so no message carries them.

If the optimizer confines a round to a ``step.subspace``, the numbers of the subspace replace the coordinates: the
active coordinates under random freeze, one number per step for zeroth-order steps. The server reads a reply in the
subspace that it sent, so a reply cannot change a frozen coordinate.
"""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fed_dpsat.client.blame import blamed_on
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.flower.wire.arrays import read_array
from fed_dpsat.params import Params, cut, laid_end_to_end
from fed_dpsat.step.subspace import Coordinates, Span

UPDATE = "fed_dpsat.update"
"""The record with the codec of a reply; absent for whole parameters in fp32."""

INDICES, VALUES = "indices", "values"


@blamed_on("codec")
def encode(
    content: RecordDict, start: Params, codec: str, share: float, within: Coordinates | Span | None = None
) -> RecordDict:
    """A reply whose parameters, which began the round at ``start``, are written by ``codec``, ``within`` a subspace."""
    if codec == "fp32" and within is None:
        return content
    before, after = (
        laid_end_to_end(start).float(),
        laid_end_to_end(records.to_read(content.array_records[records.ARRAYS])).float(),
    )
    origin, numbers = before, after
    if within is not None:
        origin, numbers = within.numbers(before, before), within.numbers(before, after)
    change, kept = numbers - origin, _kept(len(numbers), share)
    if codec == "fp32":
        arrays = {VALUES: numbers.numpy()}
    elif codec == "bf16":
        arrays = {VALUES: change.to(torch.bfloat16).view(torch.int16).numpy()}
    elif codec == "top-k":
        found = change.abs().topk(kept).indices.sort().values
        arrays = {INDICES: found.numpy().astype(np.uint32), VALUES: change[found].numpy()}
    else:
        found = _drawn(content, len(change), kept)
        arrays = {VALUES: (change[found] * (len(change) / kept)).numpy()}
    how = ConfigRecord({"codec": codec, "share": share})
    return RecordDict({**content, records.ARRAYS: compat.record_of(arrays), UPDATE: how})


@blamed_on("codec")
def decode(content: RecordDict, like: ArrayRecord, within: Coordinates | Span | None = None) -> RecordDict:
    """The reply with its parameters in full, beginning at ``like``; raises ``RecordError`` for an invalid one.

    ``within`` is the subspace that the server sent; with one, a whole model is an invalid reply.
    """
    said = records.config_in(content, UPDATE)
    if said is None:
        if within is not None:
            raise records.RecordError(f"no {UPDATE!r} record: a whole model, where the round is within a subspace")
        return content
    start = records.to_read(like)
    before = laid_end_to_end(start).float()
    origin = before if within is None else within.numbers(before, before)
    codec, share = said.get("codec"), said.get("share")
    if not isinstance(share, float) or not 0 < share <= 1 or set(said) != {"codec", "share"}:
        raise records.RecordError(f"{UPDATE} is {dict(said)}, which is no codec and share")
    if codec == "fp32" and within is not None:
        params = cut(within.end(before, _values(content, len(origin))), start)
    else:
        change = _change(content, str(codec), share, len(origin))
        if within is not None:
            params = cut(within.end(before, origin + change), start)
        else:
            params = {name: start[name] + c.to(start[name].dtype) for name, c in cut(change, start).items()}
    full = RecordDict({**content, records.ARRAYS: records.to_arrays(params)})
    del full[UPDATE]
    return full


def _change(content: RecordDict, codec: str, share: float, size: int) -> Tensor:
    """``[size]``, as ``codec`` wrote it; raises ``RecordError``."""
    if codec == "bf16":
        return torch.from_numpy(_array(content, VALUES, size, "int16").copy()).view(torch.bfloat16).float()
    if codec not in ("top-k", "random-k"):
        raise records.RecordError(f"codec {codec[:40]!r} is none of this version's")
    kept = _kept(size, share)
    values = _values(content, kept)
    if codec == "top-k":
        found = torch.from_numpy(_array(content, INDICES, kept, "uint32").astype(np.int64))
        if kept and int(found.max()) >= size:
            raise records.RecordError(f"index {int(found.max())} of an update with {size} coordinates")
    else:
        found = _drawn(content, size, kept)
    return torch.zeros(size).index_copy_(0, found, values)


def num_bytes(content: RecordDict) -> int:
    """Bytes of the arrays in ``content``, as received or to be sent."""
    arrays = [
        array for record in content.values() if isinstance(record, ArrayRecord) for _, array in compat.items(record)
    ]
    return sum(a.view().nbytes if isinstance(a, compat.Array) else len(a.data) for a in arrays)


def _array(content: RecordDict, name: str, size: int, dtype: str) -> np.ndarray:
    record = content.array_records.get(records.ARRAYS)
    if record is None or name not in record:
        raise records.RecordError(f"an encoded update without {name}")
    array = record[name]
    try:
        if isinstance(array, compat.Array) and (array.view().shape, str(array.view().dtype)) != ((size,), dtype):
            raise ValueError(f"is {array.dtype}{list(array.shape)}, not {dtype}[{size}]")
        return array.view() if isinstance(array, compat.Array) else read_array(array, (size,), np.dtype(dtype))
    except ValueError as error:
        raise records.RecordError(f"{name} {error}") from None


def _values(content: RecordDict, size: int) -> Tensor:
    return torch.from_numpy(_array(content, VALUES, size, "float32").copy())


def _kept(size: int, share: float) -> int:
    return min(size, math.ceil(share * size))


def _drawn(content: RecordDict, size: int, kept: int) -> Tensor:
    client, round, attempt, _ = records.read_event(content)
    key = blake2b(f"codec|{client}|{round}|{attempt}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(np.sort(generator.choice(size, kept, replace=False)))
