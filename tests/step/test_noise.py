from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats

from fed_dpsat.step.mechanism import normals_like
from fed_dpsat.step.noise import (
    SERVER,
    WORDS,
    Purpose,
    derive_generator,
    derive_seed,
    standard_normals,
)

ONE = {"seed": 1, "purpose": "noise", "client": 2, "round": 3, "attempt": 0}
OTHERS = {"seed": 2, "purpose": "sampling", "client": 3, "round": 2, "attempt": 1}


def key(**identity):
    """The 128-bit key of a generator."""
    return tuple(derive_generator(**identity).bit_generator.state["state"]["key"].tolist())


def first_draw(**identity):
    return tuple(derive_generator(**identity).integers(2**64, size=2, dtype=np.uint64).tolist())


def test_equal_arguments_give_the_stream_from_its_start():
    first = derive_generator(**ONE)
    first.standard_normal(7)
    assert first_draw(**ONE) == first_draw(**ONE)
    assert (derive_generator(**ONE).standard_normal(7) == derive_generator(**ONE).standard_normal(7)).all()


@pytest.mark.parametrize("name", OTHERS)
def test_each_of_the_five_makes_another_stream(name):
    other = ONE | {name: OTHERS[name]}
    assert key(**ONE) != key(**other)
    assert first_draw(**ONE) != first_draw(**other)


def test_no_two_of_many_identities_share_a_key_or_a_draw():
    """Digits that could be read across a boundary (1|11, 11|1, 111) and seeds 2^32 apart are among them."""
    seeds = (0, 1, 11, 2**32, 2**32 + 1)
    clients = (SERVER, 0, 1, 2, 10, 11, 111, 1111, 10**6)
    rounds = (0, 1, 2, 10, 11, 111, 1111)
    identities = [
        {"seed": s, "client": c, "round": r, "attempt": a, "purpose": p}
        for s, c, r, a, p in product(seeds, clients, rounds, (0, 1, 11), get_args(Purpose))
    ]
    assert len(identities) > 4_000
    generators = [derive_generator(**identity) for identity in identities]
    keys = {tuple(g.bit_generator.state["state"]["key"].tolist()) for g in generators}
    assert len(keys) == len(identities)
    assert len({tuple(g.integers(2**64, size=2, dtype=np.uint64).tolist()) for g in generators}) == len(identities)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"client": 1, "round": 11}, {"client": 11, "round": 1}),
        ({"client": 1, "round": 1, "attempt": 1}, {"client": 11, "round": 1, "attempt": 0}),
        ({"client": 1, "round": 0}, {"client": 10, "round": 0}),
        ({"client": SERVER}, {"client": 1}),
        ({"client": 0}, {"client": SERVER}),
    ],
)
def test_swapped_and_shifted_digits_differ(a, b):
    assert key(seed=0, purpose="noise", **a) != key(seed=0, purpose="noise", **b)


def test_a_torch_generator_would_keep_only_32_bits_of_its_key():
    """Why noise comes from Philox: on CPU, seeds 2^32 apart are the same stream to torch."""
    draws = [torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32)]
    assert torch.equal(*draws)
    assert first_draw(**ONE | {"seed": 5}) != first_draw(**ONE | {"seed": 5 + 2**32})


@pytest.mark.parametrize("name", OTHERS)
def test_neighbouring_streams_are_uncorrelated(name):
    n = 20_000
    a, b = (derive_generator(**i).standard_normal(n) for i in (ONE, ONE | {name: OTHERS[name]}))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / n**0.5


def test_streams_do_not_change_from_version_to_version():
    """A resumed run continues the streams it started with."""
    assert derive_generator(**ONE).integers(10**9) == 679188870


def test_a_seed_has_31_bits_and_names_its_purpose():
    seeds = [derive_seed(0, purpose="model", client=c) for c in range(1000)]
    assert all(0 <= s < 2**31 for s in seeds)
    assert max(seeds) > 2**30
    assert len(set(seeds)) == 1000
    assert derive_seed(0, purpose="model") == derive_seed(0, purpose="model", client=SERVER)
    assert derive_seed(0, purpose="model") != derive_seed(0, purpose="partition")


# Normals

MANY = 4_000_000


@pytest.fixture(scope="module")
def normals():
    return standard_normals(derive_generator(**ONE), MANY).double()


def test_normals_have_the_distribution(normals):
    """Kolmogorov and Smirnov, moments up to the eighth, and the tails one by one: each as far off as chance allows."""
    assert stats.kstest(normals.numpy(), "norm").pvalue > 1e-3
    for power in range(1, 9):
        moment, square = (stats.norm.moment(p) for p in (power, 2 * power))
        spread = (square - moment**2) ** 0.5 / MANY**0.5
        assert abs(float((normals**power).mean()) - moment) < 5 * spread
    for bound in (0.001, 1, 2, 3, 4, 4.5, 5):
        for side in (normals > bound, normals < -bound):
            share = stats.norm.sf(bound)
            assert abs(int(side.sum()) - share * MANY) < 5 * (share * MANY) ** 0.5 + 1


@pytest.mark.parametrize("apart", [1, 2, WORDS - 1, WORDS, WORDS + 1, 2 * WORDS, 3 * WORDS])
def test_normals_know_nothing_of_one_another(apart, normals):
    """``WORDS`` apart are the two that one word gives."""
    for of in (lambda z: z, torch.square, torch.abs, torch.sign):
        a, b = of(normals[:-apart]), of(normals[apart:])
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / len(a) ** 0.5


@pytest.mark.parametrize("count", [0, 1, 2, 3, 2 * WORDS - 1, 2 * WORDS, 2 * WORDS + 1, 5 * WORDS])
def test_any_number_of_normals_can_be_had_and_none_twice(count):
    found = standard_normals(derive_generator(**ONE), count)
    assert found.shape == (count,)
    assert found.dtype == torch.float32
    assert len(found.unique()) > 0.98 * count - 1  # there are but so many numbers in float32
    assert torch.equal(found, standard_normals(derive_generator(**ONE), count))


def test_a_generator_goes_on_where_it_was():
    generator = derive_generator(**ONE)
    first, second = standard_normals(generator, 1000), standard_normals(generator, 1000)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / 1000**0.5
    assert not torch.equal(first, second)


@pytest.mark.parametrize("word", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2**32, 2**64 - 1])
def test_no_word_makes_a_normal_that_is_none(word):
    class Stuck:
        def integers(self, low, high, size, dtype):
            assert (low, high) == (0, 2**64)
            return np.full(size, word, dtype)

    assert float(standard_normals(Stuck(), 2).abs().max()) < 6.67


def test_normals_for_tensors_are_one_draw_in_their_order():
    tensors = {"b": torch.zeros(2, 3), "a": torch.zeros(()), "none": torch.zeros(0, 4)}
    found = normals_like(tensors, derive_generator(**ONE))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in tensors.items()}
    flat = torch.cat([found[name].flatten() for name in tensors])
    assert torch.equal(flat, standard_normals(derive_generator(**ONE), 7))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_normals_do_not_depend_on_the_default_type(default):
    expected = standard_normals(derive_generator(**ONE), 7)
    torch.set_default_dtype(default)
    try:
        found = standard_normals(derive_generator(**ONE), 7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_normals_do_not_change_from_version_to_version():
    expected = torch.tensor([0.36997977, 1.38399792])
    torch.testing.assert_close(standard_normals(derive_generator(**ONE), 2), expected)
