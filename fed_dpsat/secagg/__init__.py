"""Secure aggregation (Bonawitz et al., CCS 2017): the server sees a sum of vectors, and no single vector.

The arithmetic needs no network; ``client`` and ``server`` are its two sides in Flower. Curve25519, HKDF, ChaCha20 and
ChaCha20-Poly1305 come from the ``cryptography`` package. This project implements Shamir's scheme over a prime field,
numbers modulo 2^64, and the assignment of masks.
"""
