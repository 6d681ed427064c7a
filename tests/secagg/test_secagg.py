"""Sums come out, single updates do not, and nobody opens what it must not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fed_dpsat.secagg import keys, shamir
from fed_dpsat.secagg.fixed_point import LARGEST_MOVE, decode, encode, fraction_bits
from fed_dpsat.secagg.rounds import Secrets, mask, open_shares, share, unmask

SECRET = bytes(range(32))


class Round:
    """Six clients, threshold 4; some are there to the end."""

    threshold = 4

    def __init__(self, clients=range(6), size: int = 50) -> None:
        self.secrets = {c: Secrets.new(c, "1|0") for c in clients}
        self.roster = {c: s.public for c, s in self.secrets.items()}
        sent = {c: share(s, self.roster, self.threshold) for c, s in self.secrets.items()}
        self.sealed = {holder: {owner: texts[holder] for owner, texts in sent.items()} for holder in self.roster}
        generator = np.random.default_rng(0)
        self.inputs = {c: generator.integers(0, 2**64, size, dtype=np.uint64) for c in clients}

    def masked(self, client: int, present=None) -> np.ndarray:
        return mask(self.secrets[client], self.roster, present or list(self.roster), self.inputs[client])

    def opened(self, holders, arrived):
        return {h: open_shares(self.secrets[h], self.roster, self.sealed[h], arrived, self.threshold) for h in holders}


@pytest.mark.parametrize("threshold", [1, 3, 5])
def test_any_threshold_shares_give_the_secret_and_fewer_do_not(threshold):
    shares = shamir.split(SECRET, range(5), threshold)
    for chosen in itertools.combinations(shares, threshold):
        assert shamir.combine({c: shares[c] for c in chosen}, 32) == SECRET
    if threshold > 1:
        with pytest.raises(ValueError, match="too few"):
            shamir.combine({c: shares[c] for c in range(threshold - 1)}, 32)


def test_shares_of_one_secret_differ_from_time_to_time():
    assert shamir.split(SECRET, range(3), 2) != shamir.split(SECRET, range(3), 2)


def test_a_pair_agrees_by_purpose_and_nobody_else_does():
    a, b, c = (keys.new_key() for _ in range(3))
    assert keys.agree(a, keys.public_key(b), "x") == keys.agree(b, keys.public_key(a), "x")
    assert keys.agree(a, keys.public_key(b), "x") != keys.agree(a, keys.public_key(b), "y")
    assert keys.agree(a, keys.public_key(b), "x") != keys.agree(c, keys.public_key(b), "x")


def test_a_mask_is_chacha20s_stream_with_the_rfcs_zero_key():
    """RFC 8439, A.1, test vector 1: key, nonce and counter zero."""
    assert keys.expand(bytes(32), 2).tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_what_is_sealed_is_opened_unchanged_and_about_the_same():
    key = keys.new_key()
    sealed = keys.seal(key, b"text", "1|2|3")
    assert keys.unseal(key, sealed, "1|2|3") == b"text"
    for wrong, about in ((sealed[:-1] + bytes([sealed[-1] ^ 1]), "1|2|3"), (sealed, "1|3|2")):
        with pytest.raises(ValueError, match="was changed"):
            keys.unseal(key, wrong, about)


@pytest.mark.parametrize("gone", [(), (0,), (5,), (1, 4)])
def test_the_sum_comes_out_whoever_drops_out_before_sending(gone):
    r = Round()
    arrived = [c for c in r.roster if c not in gone]
    masked = {c: r.masked(c) for c in arrived}
    total = unmask("1|0", r.roster, masked, r.opened(arrived, arrived), r.threshold)
    assert np.array_equal(total, sum(r.inputs[c] for c in arrived))


def test_the_sum_comes_out_if_some_go_before_they_open():
    r = Round()
    arrived = [0, 1, 2, 3, 4]
    masked = {c: r.masked(c) for c in arrived}
    total = unmask("1|0", r.roster, masked, r.opened([0, 2, 3, 4], arrived), r.threshold)
    assert np.array_equal(total, sum(r.inputs[c] for c in arrived))


def test_too_few_open_nothing():
    r = Round()
    masked = {c: r.masked(c) for c in range(5)}
    with pytest.raises(ValueError, match="3 clients opened their shares, threshold=4"):
        unmask("1|0", r.roster, masked, r.opened([0, 1, 2], range(5)), r.threshold)
    with pytest.raises(ValueError, match="nothing is opened"):
        r.opened([0], [0, 1, 2])


def test_a_masked_update_is_uniform_whatever_it_is():
    """Of zeros, each of 64 bits is 1 in half of 4000 numbers, within six standard deviations."""
    r = Round(size=4000)
    r.inputs[0] = np.zeros(4000, dtype=np.uint64)
    bits = np.unpackbits(r.masked(0).view(np.uint8)).reshape(4000, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 6 * 0.5 / np.sqrt(4000)


def test_without_its_own_mask_a_late_update_would_be_seen():
    """The key of a client that was given up is opened; if its update comes after all, its seed still hides it."""
    r = Round()
    late, arrived = r.masked(5), [0, 1, 2, 3, 4]
    key = shamir.combine({h: s[5] for h, s in r.opened(arrived, arrived).items()}, 32)
    assert key == r.secrets[5].mask_key
    for other in arrived:
        pair = keys.expand(keys.agree(key, r.roster[other].mask, "mask|1|0"), 50)
        late = late - (pair if other > 5 else np.negative(pair))
    assert not np.array_equal(late, r.inputs[5])
    assert np.array_equal(late - keys.expand(r.secrets[5].seed, 50), r.inputs[5])


def test_of_each_client_the_seed_or_the_key_is_opened_and_never_both():
    r = Round()
    arrived = [0, 1, 2, 3]
    opened = r.opened(arrived, arrived)
    for owner in r.roster:
        found = shamir.combine({holder: shares[owner] for holder, shares in opened.items()}, 32)
        assert found == (r.secrets[owner].seed if owner in arrived else r.secrets[owner].mask_key)


@pytest.mark.parametrize("threshold", [0, 3, 7])
def test_a_threshold_that_is_no_majority_is_refused(threshold):
    r = Round()
    with pytest.raises(ValueError, match="is not a majority of 6"):
        share(r.secrets[0], r.roster, threshold)


def test_a_roster_with_other_keys_for_oneself_is_refused():
    r = Round()
    with pytest.raises(ValueError, match="does not hold the keys of client 0"):
        share(r.secrets[0], {**r.roster, 0: r.roster[1]}, 4)


def test_keys_of_another_round_mask_differently():
    r = Round()
    other = Secrets(**{**r.secrets[0].__dict__, "round": "2|0"})
    assert not np.array_equal(mask(other, r.roster, list(r.roster), r.inputs[0]), r.masked(0))


def test_the_mean_is_within_its_bound():
    generator = np.random.default_rng(0)
    moves, weights = generator.standard_normal((7, 1000)), np.array([1, 5, 30, 100, 144, 20, 7.0])
    bits = fraction_bits(weights.sum())
    total = np.zeros(1000, dtype=np.uint64)
    for move, weight in zip(moves, weights, strict=True):
        total += encode(move, weight, bits)
    away = np.abs(decode(total, weights.sum(), bits) - weights @ moves / weights.sum()).max()
    half_units = 7 * 0.5 * 2.0**-bits / weights.sum()  # half a unit a client, and the rounding of float64
    assert away <= half_units + 8 * LARGEST_MOVE * 2.0**-52 < 1e-10


def test_a_coordinate_beyond_the_bound_is_cut_and_nan_refused():
    bits = fraction_bits(1)
    assert decode(encode(np.array([1e9, -1e9, 0.5]), 1, bits), 1, bits).tolist() == [LARGEST_MOVE, -LARGEST_MOVE, 0.5]
    with pytest.raises(ValueError, match="NaN"):
        encode(np.array([np.nan]), 1, bits)


def test_masks_that_did_not_cancel_are_noticed():
    r = Round()
    with pytest.raises(ValueError, match="masks did not cancel"):
        decode(sum(r.masked(c) for c in range(6)), 10, fraction_bits(10))


def test_too_many_examples_leave_no_digits():
    with pytest.raises(ValueError, match="fewer than 16"):
        fraction_bits(1e13)
