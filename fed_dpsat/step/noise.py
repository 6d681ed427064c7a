"""Where randomness comes from: generators that are derived, named and never shared.

Every draw of a seeded simulation comes from a generator derived from (run seed, client, round, attempt, purpose).
The five are hashed to the 128-bit key of a Philox counter generator, so two different tuples share a stream
only if BLAKE2b collides. Its words are the same in every version of numpy, and normals are made of them here, since
numpy promises no such thing of its own. (``torch.Generator`` on CPU keeps just 32 bits of its seed: a few ten thousand
streams would be enough for two clients to share their noise.) With ``noise_source=system`` what must stay secret comes
from the operating system instead: batches and noise from ``secure_noise``, and the key of what examples draw
inside a model (``draws``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Purpose = Literal[
    "sampling",
    "noise",
    "draws",
    "model",
    "cohort",
    "partition",
    "faults",
    "attack",
    "freeze",
    "direction",
    "validation",
    "test split",
    "trial",
    "adapter",
    "statistics",
    "evaluation",
    "holdout",
]

SECRET: frozenset[Purpose] = frozenset({"sampling", "noise", "draws", "statistics", "evaluation"})
"""What the guarantee needs nobody to know. The other draws are public, and seeded whatever the source.

"draws" are those of single examples inside a model, such as dropout; "model" and "adapter" are initial weights, "model"
also what an optimizer draws, which never sees an example.
"""

SERVER = -1
"""The ``client`` of what is drawn for the run as a whole."""


@dataclass(frozen=True, kw_only=True)
class NoiseSource:
    """What a run may say of its batches and noise: in the terminal, the summary and the report."""

    reproducible: bool
    description: str


NOISE_SOURCES = {
    "seeded": NoiseSource(reproducible=True, description="seeded: reproducible, not private"),
    "system": NoiseSource(
        reproducible=False,
        description="system: cryptographic, from operating-system entropy, on a grid against floating-point attacks",
    ),
}
"""The choices of the setting ``noise_source``."""


def derive_generator(
    seed: int, *, purpose: Purpose, client: int = SERVER, round: int = 0, attempt: int = 0
) -> np.random.Generator:
    """The generator of one purpose of one client's attempt at one round; equal arguments, equal stream.

    Reproducible and therefore NOT private: whoever knows the seed can subtract the noise.
    """
    key = derive_key(seed, purpose=purpose, client=client, round=round, attempt=attempt)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def derive_key(seed: int, *, purpose: Purpose, client: int = SERVER, round: int = 0, attempt: int = 0) -> bytes:
    """16 bytes for one purpose of one client's attempt at one round; NOT secret."""
    identity = f"fed_dpsat|{seed}|{client}|{round}|{attempt}|{purpose}".encode()
    return blake2b(identity, digest_size=16).digest()


def keyed_words(keys: Sequence[bytes], start: int, count: int) -> NDArray[np.uint64]:
    """``[K, count]``: the words ``start`` to ``start + count`` of the generators with these ``keys``, row by row.

    One bit generator goes from stream to stream: making one takes longer than a small model needs of its words.
    """
    skipped = start % PHILOX_WORDS
    words, bits = np.empty((len(keys), count), np.uint64), np.random.Philox(key=0)
    state = bits.state
    state["buffer_pos"] = PHILOX_WORDS
    state["state"]["counter"][0] = start // PHILOX_WORDS
    for row, key in zip(words, keys, strict=True):
        state["state"]["key"][:] = np.frombuffer(key, np.uint64)
        bits.state = state
        row[:] = bits.random_raw(skipped + count)[skipped:]
    return words


def uniforms(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """What ``Generator.random`` makes of ``words``, shapes as given: numbers in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derive_seed(seed: int, *, purpose: Purpose, client: int = SERVER, round: int = 0, attempt: int = 0) -> int:
    """A 31-bit seed for code that brings its own generator (model initialisation, partitioners)."""
    generator = derive_generator(seed, purpose=purpose, client=client, round=round, attempt=attempt)
    return int(generator.integers(2**31))


def standard_laplaces(generator: np.random.Generator, count: int) -> Tensor:
    """``count`` independent Laplace numbers of scale 1 in float64, of one 64-bit word each.

    A sign, and an exponential number by the inverse of its distribution from 53 bits: none is beyond 37.5, which 6e-17
    of the distribution is.
    """
    words = generator.integers(0, 2**64, size=count, dtype=np.uint64)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(np.log(uniform) * np.where(words & np.uint64(1), 1.0, -1.0))


WORDS = 1 << 15
"""Drawn at a time: what is made of them stays in the cache."""
PHILOX_WORDS = 4
"""What Philox makes of one value of its counter."""


def standard_normals(generator: np.random.Generator, count: int) -> Tensor:
    """``count`` independent standard normals in float32, of the generator's next 64-bit words, one for two of them.

    By Box and Muller (1958), a radius of 31 bits and an angle of 32: none is beyond 6.66, which 3e-11 of a normal
    distribution is. numpy's own ``standard_normal`` takes three times as long.
    """

    def draw(size: int) -> NDArray[np.uint64]:
        return generator.integers(0, 2**64, size=(1, size), dtype=np.uint64)

    return _normals(draw, 1, count)[0]


def keyed_normals(keys: Sequence[bytes], step: int, count: int) -> Tensor:
    """``[K, count]``: the ``step``-th ``standard_normals(generator, count)`` of each key's generator, from 0."""
    at = step * math.ceil(count / 2)

    def draw(size: int) -> NDArray[np.uint64]:
        nonlocal at
        at += size
        return keyed_words(keys, at - size, size)

    return _normals(draw, len(keys), count)


def _normals(draw: Callable[[int], NDArray[np.uint64]], rows: int, count: int) -> Tensor:
    """``[rows, count]`` of the words that ``draw`` gives for each row."""
    normals = torch.empty((rows, 2 * math.ceil(count / 2)), dtype=torch.float32)
    for start in range(0, normals.shape[1], 2 * WORDS):
        pair = normals[:, start : start + 2 * WORDS].view(rows, 2, -1)
        words = torch.from_numpy(draw(pair.shape[2]).view(np.int32)).view(rows, 2, -1)
        first, second = words[:, 0], words[:, 1]
        uniform = (first & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
        radius = uniform.log_().mul_(-2).sqrt_()
        angle = second.float().mul_(math.pi * 2.0**-31)
        torch.cos(angle, out=pair[:, 0])
        torch.sin(angle, out=pair[:, 1])
        pair *= radius[:, None]
    return normals[:, :count]
