"""Where randomness comes from: generators that are derived, named and never shared.

Every draw of a seeded simulation comes from a generator derived from (run seed, client, round, attempt, purpose).
The five are hashed to the 128-bit key of a Philox counter generator, so two different tuples share a stream
only if BLAKE2b collides. (``torch.Generator`` on CPU keeps just 32 bits of its seed: a few ten thousand
streams would be enough for two clients to share their noise.) With ``noise_source=system`` what must stay secret,
batches and noise, comes from ``fed_dpsat.secure_noise`` instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np

Purpose = Literal[
    "sampling",
    "noise",
    "model",
    "cohort",
    "partition",
    "faults",
    "attack",
    "freeze",
    "direction",
    "validation",
]

SECRET: frozenset[Purpose] = frozenset({"sampling", "noise"})
"""What the guarantee needs nobody to know. The other draws are public, and seeded whatever the source."""

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
    identity = f"fed_dpsat|{seed}|{client}|{round}|{attempt}|{purpose}".encode()
    key = int.from_bytes(blake2b(identity, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def derive_seed(seed: int, *, purpose: Purpose, client: int = SERVER, round: int = 0, attempt: int = 0) -> int:
    """A 31-bit seed for code that brings its own generator (model initialisation, partitioners)."""
    generator = derive_generator(seed, purpose=purpose, client=client, round=round, attempt=attempt)
    return int(generator.integers(2**31))
