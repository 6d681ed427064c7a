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
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
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
]

SECRET: frozenset[Purpose] = frozenset({"sampling", "noise", "draws"})
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


def standard_normals(generator: np.random.Generator, count: int) -> Tensor:
    """``count`` independent standard normals in float32, of the generator's next 64-bit words, one for two of them.

    By Box and Muller (1958), a radius of 31 bits and an angle of 32: none is beyond 6.66, which 3e-11 of a normal
    distribution is. numpy's own ``standard_normal`` takes three times as long.
    """
    normals = torch.empty(2 * math.ceil(count / 2), dtype=torch.float32)
    for start in range(0, len(normals), 2 * WORDS):
        pair = normals[start : start + 2 * WORDS].view(2, -1)
        words = generator.integers(0, 2**64, size=pair.shape[1], dtype=np.uint64)
        first, second = torch.from_numpy(words.view(np.int32)).view(2, -1)
        uniform = (first & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
        radius = uniform.log_().mul_(-2).sqrt_()
        angle = second.float().mul_(math.pi * 2.0**-31)
        torch.cos(angle, out=pair[0])
        torch.sin(angle, out=pair[1])
        pair *= radius
    return normals[:count]
