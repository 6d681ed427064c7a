"""Sums of vectors of which nobody sees a single one (Bonawitz et al., CCS 2017): the arithmetic,
without a network, and its halves in Flower (``client`` and ``server``).

Curve25519, HKDF, ChaCha20 and ChaCha20-Poly1305 are those of the ``cryptography`` package; what is ours is Shamir's
scheme over a prime field, numbers modulo 2^64, and which masks go where.
"""
