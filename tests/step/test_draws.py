"""Words of a cipher: who shares them, and what is made of them."""

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fed_dpsat.step import draws
from fed_dpsat.step.draws import Draws, kept, normals, ones, step_key, uniforms

KEY = bytes(range(16))
IDS = np.array([7, 0, 3_000_000_000])


def words(key=KEY, ids=IDS, call=0, count=10):
    return Draws(key=key, ids=np.asarray(ids)).words(call, count)


def stream(count, **changes):
    """``count`` words of 1,000 examples, end to end."""
    return torch.from_numpy(np.ascontiguousarray(words(ids=np.arange(1000), count=count // 1000, **changes))).flatten()


def test_a_word_is_aes_of_example_call_and_place():
    """As FIPS 197 has it: one block at a time, by the same library's one-block interface."""
    cipher = Cipher(algorithms.AES(KEY), modes.ECB())
    for row, example in zip(words(call=5), IDS.tolist(), strict=True):
        expected = b""
        for block in range(3):
            encryptor = cipher.encryptor()
            plain = example.to_bytes(8, "little") + (5).to_bytes(4, "little") + block.to_bytes(4, "little")
            expected += encryptor.update(plain) + encryptor.finalize()
        assert row.tolist() == np.frombuffer(expected, dtype=np.int32)[:10].tolist()


@pytest.mark.parametrize("count", [1, 4, 5, 70_000])
def test_an_example_draws_the_same_beside_anyone(count):
    together = words(count=count)
    for i, example in enumerate(IDS):
        assert (words(ids=[example], count=count)[0] == together[i]).all()
    chunks = [Draws(key=KEY, ids=IDS).some(slice(i, i + 2)).words(0, count) for i in range(0, len(IDS), 2)]
    assert (np.concatenate(chunks) == together).all()


@pytest.mark.parametrize(
    "other",
    [{"key": bytes(16)}, {"key": step_key(KEY, 0)}, {"ids": IDS + 1}, {"call": 1}],
    ids=["key", "step", "id", "call"],
)
def test_everything_that_names_a_draw_changes_it(other):
    equal = (words(count=1000) == words(count=1000, **other)).mean()
    assert equal < 0.01


def test_no_two_draws_of_a_thousand_examples_share_a_stream():
    """Two repeats among 250,000 blocks of 128 bits would be no chance."""
    drawn = np.concatenate([words(ids=np.arange(1000), call=call, count=100).reshape(-1, 4) for call in range(10)])
    assert len(np.unique(drawn, axis=0)) == len(drawn)


def z(hits, count, p):
    return abs(hits - count * p) / math.sqrt(count * p * (1 - p))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_a_share_p_is_dropped(p):
    """Of 4 million; a p that is wrong by 2 % is told apart."""
    drawn = stream(4_000_000)
    dropped = int((~kept(drawn, p)).sum())
    assert z(dropped, 4_000_000, p) < 5
    assert z(dropped, 4_000_000, 0.98 * p) > 5 < z(dropped, 4_000_000, min(0.999, 1.02 * p))
    assert z(int(ones(drawn, torch.tensor(p)).sum()), 4_000_000, p) < 5


def test_the_ends_of_p():
    drawn = torch.tensor([-(2**31), -1, 0, 2**31 - 1], dtype=torch.int32)
    assert kept(drawn, 1.0).tolist() == [False] * 4
    assert kept(drawn, 0.0).tolist() == [True] * 4
    assert kept(drawn, 0.5).tolist() == [False, False, True, True]
    assert ones(drawn, torch.tensor(1.0)).tolist() == [True] * 4
    assert ones(drawn, torch.tensor(0.0)).tolist() == [False] * 4


def uncorrelated(first, second):
    """Whether two samples of zeros and ones agree as often as chance has it."""
    return z(int((first == second).sum()), first.numel(), 0.5) < 5


def test_masks_of_examples_calls_and_steps_are_independent():
    here = kept(stream(1_000_000), 0.5)
    assert uncorrelated(here, kept(stream(1_000_000, call=1), 0.5))
    assert uncorrelated(here, kept(stream(1_000_000, key=step_key(KEY, 1)), 0.5))
    assert uncorrelated(here[:-1000], here[1000:])
    assert uncorrelated(here[:-1], here[1:])
    assert not uncorrelated(here, kept(stream(1_000_000), 0.5))  # a stream that repeats is found


@pytest.mark.parametrize("dtype", draws.BITS)
def test_uniforms_and_normals(dtype):
    """Moments of 500,000 and Kolmogorov's distance from the exact distribution."""
    pairs = stream(1_000_000).view(-1, 2)
    uniform = uniforms(pairs[:, : draws.words_each(dtype)], dtype)
    assert uniform.dtype == dtype
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert float((uniform.double() * 2 ** draws.BITS[dtype] % 1).abs().max()) == 0
    grid = 2.0 ** -draws.BITS[dtype]
    assert distance(uniform.double() + grid / 2, lambda x: x) < 0.003 + grid
    drawn = normals(pairs, dtype)
    assert drawn.dtype == dtype
    assert distance(drawn.double(), lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))) < (
        0.003 if dtype.itemsize > 2 else 0.01
    )
    assert distance(1.02 * drawn.double(), lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))) > 0.003


def distance(sample, cdf):
    ordered = sample.sort().values
    ranks = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float((cdf(ordered) - ranks).abs().max())


def test_extreme_words_give_finite_numbers():
    for word in (-(2**31), -1, 0, 2**31 - 1):
        pair = torch.tensor([[word, word]], dtype=torch.int32)
        for dtype in draws.BITS:
            assert bool(normals(pair, dtype).isfinite().all())
            assert 0 <= float(uniforms(pair, dtype)) < 1


def test_a_key_does_not_show():
    assert "key" not in repr(Draws(key=KEY, ids=IDS))
    assert Draws.fresh(2).key != Draws.fresh(2).key


def test_draws_of_another_number_of_examples_are_refused():
    with Draws(key=KEY, ids=IDS).used(), pytest.raises(ValueError, match="draws of 3 examples for a batch of 2"):
        draws.of_batch(2)
    with pytest.raises(ValueError, match="2\\^34 words"):
        words(call=2**32)
