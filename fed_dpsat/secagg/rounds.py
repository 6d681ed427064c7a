"""One round of the protocol, from a client's side and from the server's: what each makes of what it got.

1. ``Secrets.new``: two key pairs and a seed; the public keys go to all through the server.
2. ``share``: the mask key and the seed are split among all, each share sealed for its holder.
3. ``mask``: the encoded update plus the seed's mask plus, for each other client, a mask that both know, once with plus
   and once with minus. To anyone who lacks a mask it is uniform.
4. ``open_shares``: of those whose update arrived, shares of the seed; of those who shared and then went, shares of the
   mask key. Never both of one client.
5. ``unmask``: the server puts the seeds and keys together and takes away what did not cancel.

Source: Bonawitz et al., CCS 2017, for a server that is honest but curious: there is no public key
infrastructure, so a server that invents clients is not kept out. Fewer than ``threshold`` clients together with it
learn nothing but sums.
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
    """What a client keeps to itself for one ``round``: keys to seal and to mask with, and the seed of its own mask."""

    round: str
    client: int
    seal_key: bytes
    mask_key: bytes
    seed: bytes

    @classmethod
    def new(cls, client: int, round: str) -> Secrets:
        """Fresh ones; ``round`` names the round and the attempt."""
        return cls(round=round, client=client, seal_key=keys.new_key(), mask_key=keys.new_key(), seed=keys.new_key())

    @property
    def public(self) -> PublicKeys:
        """What the others may know."""
        return PublicKeys(seal=keys.public_key(self.seal_key), mask=keys.public_key(self.mask_key))


@dataclass(frozen=True, kw_only=True)
class PublicKeys:
    """A client's two public keys."""

    seal: bytes
    mask: bytes


Roster = Mapping[int, PublicKeys]


def share(own: Secrets, roster: Roster, threshold: int) -> dict[int, bytes]:
    """A sealed pair of shares for every client of the ``roster``, the own one too.

    Raises ``ValueError`` for a roster without this client's own keys, or a threshold that is no majority, or 1: with
    two halves a server could have one open the seeds and the other the keys, and a sum of one hides nobody.
    """
    if roster.get(own.client) != own.public:
        raise ValueError(f"the roster does not hold the keys of client {own.client}")
    if not len(roster) < 2 * threshold <= 2 * len(roster) or threshold < 2:
        raise ValueError(f"threshold={threshold} is no majority of {len(roster)} clients")
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
    """``encoded`` under the own mask and those shared with each client ``present``, modulo 2^64."""
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
    """By client that ``sealed`` shares: that of its seed if its update ``arrived``, else that of its mask key.

    Raises ``ValueError`` where too few arrived, or some who never shared: then nothing is opened.
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
    """The sum of the encoded updates behind ``masked``, from shares by holder and then by owner.

    Raises ``ValueError`` for fewer than ``threshold`` holders, or shares of another key than was published.
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
            raise ValueError(f"the shares of client {owner} give another key than it published")
        for other in masked:
            total += _between(secret, owner, other, roster[other].mask, round, total.size)
    return total


def _between(private: bytes, own: int, other: int, public: bytes, round: str, size: int) -> Vector:
    """The mask of a pair as ``own`` adds it: plus for the lower number, minus for the higher."""
    vector = keys.expand(keys.agree(private, public, f"mask|{round}"), size)
    return vector if own < other else np.negative(vector)


def _about(round: str, owner: int, holder: int) -> str:
    return f"{round}|{owner}|{holder}"
