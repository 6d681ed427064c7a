"""What a model draws for an example: words of a cipher, a function of key, example, call and place.

Of whom else a batch is made, in what order and in which chunks, has no part in it. So, whatever the key, the clipped
gradient of an example is a function of that example alone, and one example more or less moves a sum by at most the clip
norm: the Gaussian mechanism's proof needs that. Examples are told apart by their place in a client's data, and whoever
does not know the key cannot tell the draws of one place from those of another.

A word is 32 bits of AES-128 of the block (example, call, number of the block): a pseudorandom function of the key, at a
speed that torch's own generator does not have on a CPU.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = BLOCK_BYTES = 16
BYTES_AT_ONCE = 1 << 18
"""Of blocks: what is encrypted together stays in the cache."""

SEEDS = 2**32 - 1
"""The number of the call whose words seed generators of an example's own."""
VIEWS, CHOICE = SEEDS - 1, SEEDS - 2
"""Those whose words say which views an example has, and which of a person's examples are in a batch."""


def fresh_key() -> bytes:
    """A key that was never there before, from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def step_key(key: bytes, step: int) -> bytes:
    """The key of one step of those that ``key`` stands for."""
    return blake2b(step.to_bytes(8, "little"), key=key, digest_size=KEY_BYTES).digest()


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The draws of a batch: the secret ``key`` of one step, and which examples they are for, ``ids[B]``."""

    key: bytes = field(repr=False)
    ids: NDArray[np.int64]

    @classmethod
    def fresh(cls, count: int) -> Draws:
        """A key that nobody repeats, for ``count`` examples by their position."""
        return cls(key=fresh_key(), ids=np.arange(count))

    def __len__(self) -> int:
        return len(self.ids)

    def some(self, part: slice | NDArray[np.int64]) -> Draws:
        """Those of the examples of ``part``."""
        return self.of(self.ids[part])

    def of(self, ids: NDArray[np.int64]) -> Draws:
        """Those of other examples, in the same step."""
        found = Draws(key=self.key, ids=ids)
        found.__dict__["_encrypt"] = self._encrypt
        return found

    @contextmanager
    def used(self) -> Iterator[None]:
        """Models draw these until the end."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def words(self, call: int, count: int) -> NDArray[np.int32]:
        """``[B, count]``, the words of each example in the ``call``-th call of its pass."""
        blocks = math.ceil(count / 4)
        if call > SEEDS or blocks > 2**32:
            raise ValueError(f"call {call} for {count} words: a pass has 2^32 calls of 2^34 words per example")
        made = np.empty(len(self) * blocks * BLOCK_BYTES + BLOCK_BYTES - 1, dtype=np.uint8)
        number = np.arange(blocks, dtype=np.uint64)
        number <<= np.uint64(32)
        number |= np.uint64(call)
        rows = max(1, BYTES_AT_ONCE // (blocks * BLOCK_BYTES))
        for start in range(0, len(self), rows):
            ids = self.ids[start : start + rows]
            block = np.empty((len(ids), blocks, 2), dtype=np.uint64)
            block[..., 0] = ids[:, None]
            block[..., 1] = number
            self._encrypt.update_into(block.view(np.uint8).data.cast("B"), made[start * blocks * BLOCK_BYTES :].data)
        words = made[: len(self) * blocks * BLOCK_BYTES].view(np.int32).reshape(len(self), 4 * blocks)
        return words[:, :count]

    def seeds(self) -> list[int]:
        """128 bits for each example, to seed generators that its own pass alone uses."""
        return [int.from_bytes(row.tobytes(), "little") for row in self.words(SEEDS, 4)]

    @cached_property
    def _encrypt(self) -> Any:
        return Cipher(AES(self.key), ECB()).encryptor()  # of blocks that are all different: a counter mode


_current: ContextVar[Draws | None] = ContextVar("draws", default=None)


def of_batch(count: int) -> Draws:
    """The draws in use, or, where none are, those of ``count`` examples by position under a fresh key.

    Raises ``ValueError`` for draws of another number of examples.
    """
    draws = _current.get()
    if draws is None:
        return Draws.fresh(count)
    if len(draws) != count:
        raise ValueError(f"draws of {len(draws)} examples for a batch of {count}")
    return draws


def kept(words: Tensor, p: float) -> Tensor:
    """Which of int32 ``words`` have a 1, bool: each has one with probability 1 - ``p``, to 2^-33; none at ``p`` 1."""
    least = round(p * 2**32)
    return torch.zeros_like(words, dtype=torch.bool) if least == 2**32 else words >= least - 2**31


def thinning(words: NDArray[np.int32], p: float) -> NDArray[np.float32]:
    """``kept`` over 1 - ``p``, which a dropout multiplies by: numpy makes it in a third of torch's time on a CPU."""
    least = round(p * 2**32)
    if least == 2**32:
        return np.zeros(words.shape, dtype=np.float32)
    mask: NDArray[np.float32] = (words >= np.int32(least - 2**31)) * np.float32(1 / (1 - p))
    return mask


def ones(words: Tensor, probabilities: Tensor) -> Tensor:
    """Which of ``words`` have a 1, bool: each with its own of ``probabilities``, to 2^-32."""
    return words.double() + 2.0**31 < probabilities.double() * 2.0**32


BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Of a uniform number, as torch's own have them."""


def words_each(dtype: torch.dtype) -> int:
    """How many words a uniform number takes."""
    return 2 if dtype == torch.float64 else 1


def uniforms(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiples of 2^-bits in [0, 1), of ``words[..., words_each]``."""
    bits = BITS[dtype]
    if bits > 32:
        high, low = ((words[..., i].to(torch.int64) & 0xFFFFFFFF) for i in (0, 1))
        whole, wide = (high << 21) ^ (low >> 11), torch.float64
    else:
        whole, wide = (words[..., 0] >> (32 - bits)) + 2 ** (bits - 1), torch.float32
    return whole.to(wide).mul_(2.0**-bits).to(dtype)


def normals(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normals, of ``words[..., 2]``: by Box and Muller (1958), a radius of 31 bits and an angle of 32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    uniform = ((words[..., 0] & 0x7FFFFFFF).to(wide) + 0.5) * 2.0**-31
    return (uniform.log().mul(-2).sqrt() * (words[..., 1].to(wide) * (math.pi * 2.0**-31)).cos()).to(dtype)
