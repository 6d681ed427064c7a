"""One round of the protocol: the computations of a client and of the server.

1. ``Secrets.new``: a client makes two key pairs and a seed; the server forwards the public keys to all clients.
2. ``share``: a client splits its mask key and its seed among all clients, and seals each share for its holder.
3. ``mask``: a client adds to its encoded update the mask of its seed and, for each other client, a mask that both know;
   one of the two adds it, the other subtracts it. Without a mask, the result is uniform.
4. ``open_shares``: a client opens shares of the seed for each client whose update arrived, and shares of the mask key
   for each client that shared and then dropped out. It never opens both for one client.
5. ``unmask``: the server combines seeds and keys, and removes the masks that did not cancel.

Source: Bonawitz et al., CCS 2017, for an honest but curious server: without a public key infrastructure, a server can
invent clients. The server together with fewer than ``threshold`` clients learns only sums.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpsat.secagg import keys, shamir

Vector = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """The secrets of a client for one ``round``: a key to seal, a key for masks, and the seed of its own mask."""

    round: str
    client: int
    seal_key: bytes
    mask_key: bytes
    seed: bytes

    @classmethod
    def new(cls, client: int, round: str) -> Secrets:
        """Fresh secrets; ``round`` names the round and the attempt."""
        return cls(round=round, client=client, seal_key=keys.new_key(), mask_key=keys.new_key(), seed=keys.new_key())

    @property
    def public(self) -> PublicKeys:
        """The public keys, which all clients may know."""
        return PublicKeys(seal=keys.public_key(self.seal_key), mask=keys.public_key(self.mask_key))


@dataclass(frozen=True, kw_only=True)
class PublicKeys:
    """A client's two public keys."""

    seal: bytes
    mask: bytes


Roster = Mapping[int, PublicKeys]


def share(own: Secrets, roster: Roster, threshold: int) -> dict[int, bytes]:
    """A sealed pair of shares for every client of the ``roster``, including this client.

    Raises ``ValueError`` for a roster without the keys of this client, a threshold without a majority, and threshold 1.
    Without a majority, one half could open the seeds and the other half the keys; a sum of one client hides nothing.
    """
    if roster.get(own.client) != own.public:
        raise ValueError(f"the roster does not hold the keys of client {own.client}")
    if not len(roster) < 2 * threshold <= 2 * len(roster) or threshold < 2:
        raise ValueError(f"threshold={threshold} is not a majority of {len(roster)} clients")
    of_key = shamir.split(own.mask_key, roster, threshold)
    of_seed = shamir.split(own.seed, roster, threshold)
    return {
        other: keys.seal(
            keys.agree(own.seal_key, public.seal, "seal"),
            of_key[other] + of_seed[other],
            _about(own.round, own.client, other),
        )
        for other, public in roster.items()
    }


def mask(own: Secrets, roster: Roster, present: Collection[int], encoded: Vector) -> Vector:
    """``encoded`` plus the own mask and the masks shared with each client in ``present``, modulo 2^64."""
    masked = encoded + keys.expand(own.seed, encoded.size)
    for other in present:
        if other != own.client:
            masked += _between(own.mask_key, own.client, other, roster[other].mask, own.round, encoded.size)
    return masked


def open_shares(
    own: Secrets,
    roster: Roster,
    sealed: Mapping[int, bytes],
    arrived: Collection[int],
    threshold: int,
) -> dict[int, bytes]:
    """By client in ``sealed``: the share of its seed if its update ``arrived``, else the share of its mask key.

    Raises ``ValueError``, and opens nothing, if too few updates arrived, or one of a client that never shared.
    """
    if len(arrived) < threshold or own.client not in arrived or not set(arrived) <= sealed.keys():
        raise ValueError(f"{len(arrived)} updates arrived, threshold={threshold}: nothing is opened")
    opened = {}
    for other, text in sealed.items():
        pair = keys.unseal(
            keys.agree(own.seal_key, roster[other].seal, "seal"), text, _about(own.round, other, own.client)
        )
        opened[other] = pair[shamir.SHARE_BYTES :] if other in arrived else pair[: shamir.SHARE_BYTES]
    return opened


def unmask(
    round: str,
    roster: Roster,
    masked: Mapping[int, Vector],
    opened: Mapping[int, Mapping[int, bytes]],
    threshold: int,
) -> Vector:
    """The sum of the encoded updates in ``masked``, from shares by holder and then by owner.

    Raises ``ValueError`` for fewer than ``threshold`` holders, or shares of a key other than the published one.
    """
    if len(opened) < threshold:
        raise ValueError(f"{len(opened)} clients opened their shares, threshold={threshold}")
    total = np.zeros_like(next(iter(masked.values())))
    for vector in masked.values():
        total += vector
    owners = sorted(next(iter(opened.values())))
    for owner in owners:
        secret = shamir.combine({holder: shares[owner] for holder, shares in opened.items()}, keys.KEY_BYTES)
        if owner in masked:
            total -= keys.expand(secret, total.size)
            continue
        if keys.public_key(secret) != roster[owner].mask:
            raise ValueError(f"the shares of client {owner} do not give the key that it published")
        for other in masked:
            total += _between(secret, owner, other, roster[other].mask, round, total.size)
    return total


def _between(private: bytes, own: int, other: int, public: bytes, round: str, size: int) -> Vector:
    """The mask of a pair for the client ``own``: positive for the lower number, negative for the higher."""
    vector = keys.expand(keys.agree(private, public, f"mask|{round}"), size)
    return vector if own < other else np.negative(vector)


def _about(round: str, owner: int, holder: int) -> str:
    return f"{round}|{owner}|{holder}"
