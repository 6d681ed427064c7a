"""Key pairs, key agreement, sealed messages, and masks from a seed."""

from __future__ import annotations

import os

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

KEY_BYTES = 32
NONCE_BYTES = 12


def new_key() -> bytes:
    """A private X25519 key, or a seed: 32 bytes from the operating system."""
    return os.urandom(KEY_BYTES)


def public_key(private: bytes) -> bytes:
    """The public key of ``private``."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: str) -> bytes:
    """The 32 bytes that two key pairs share for one ``purpose``; raises ``ValueError`` for a degenerate public key."""
    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=f"fed_dpsat|{purpose}".encode()).derive(
        shared
    )


def expand(seed: bytes, size: int) -> NDArray[np.uint64]:
    """``[size]`` numbers modulo 2^64 from ChaCha20, uniform without knowledge of ``seed``. Use a seed only once."""
    stream = Cipher(ChaCha20(seed, b"\0" * 16), mode=None).encryptor().update(b"\0" * (8 * size))
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64)


def seal(key: bytes, text: bytes, about: str) -> bytes:
    """``text``, encrypted and authenticated, with ``about`` as associated data."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, about.encode())


def unseal(key: bytes, sealed: bytes, about: str) -> bytes:
    """The inverse of ``seal``; raises ``ValueError`` for a changed message or another ``about``."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], about.encode())
    except InvalidTag:
        raise ValueError(f"a sealed message about {about} was changed in transit") from None
