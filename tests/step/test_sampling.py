from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from fed_dpsat.errors import SettingError
from fed_dpsat.step.sampling import PoissonSampler

N, RATE, STEPS = 50, 0.2, 4000


def is_poisson(batches, num_examples, rate):
    """Whether each example follows its own coin: its frequency, the batch sizes' variance, successive batches."""
    coins = np.zeros((len(batches), num_examples))
    for row, batch in zip(coins, batches, strict=True):
        np.add.at(row, batch, 1)
    if coins.max() > 1:
        return False
    variance = rate * (1 - rate)
    frequency = np.square(coins.sum(0) - len(coins) * rate).sum() / (len(coins) * variance)
    size = np.square(coins.sum(1) - num_examples * rate).sum() / (num_examples * variance)
    centred = coins - rate
    memory = (centred[1:] * centred[:-1]).sum() / (variance * centred[1:].size ** 0.5)
    p_frequency, p_size = (
        2 * min(stats.chi2.cdf(x, k), stats.chi2.sf(x, k)) for x, k in ((frequency, num_examples), (size, len(coins)))
    )
    return min(p_frequency, p_size, 2 * stats.norm.sf(abs(memory))) > 1e-4


def fixed_size(generator):
    for _ in range(STEPS):
        yield generator.choice(N, size=int(N * RATE), replace=False)


def with_replacement(generator):
    for _ in range(STEPS):
        yield generator.choice(N, size=generator.binomial(N, RATE))


def shuffled_epochs(generator):
    for _ in range(int(STEPS * RATE)):
        yield from generator.permutation(N).reshape(int(1 / RATE), -1)


def one_coin_for_all(generator):
    for _ in range(STEPS):
        yield np.arange(N if generator.random() < RATE else 0)


def one_coin_for_two_batches(generator):
    for _ in range(STEPS // 2):
        yield from [np.flatnonzero(generator.random(N) < RATE)] * 2


def too_rare(generator):
    yield from PoissonSampler(num_examples=N, sample_rate=0.95 * RATE).batches(STEPS, generator)


def favourites(generator):
    rates = np.linspace(0.5, 1.5, N) * RATE
    for _ in range(STEPS):
        yield np.flatnonzero(generator.random(N) < rates)


def test_every_example_has_its_own_coin():
    sampler = PoissonSampler(num_examples=N, sample_rate=RATE)
    assert is_poisson(list(sampler.batches(STEPS, np.random.default_rng(0))), N, RATE)


@pytest.mark.parametrize(
    "broken",
    [
        fixed_size,
        with_replacement,
        shuffled_epochs,
        one_coin_for_all,
        one_coin_for_two_batches,
        too_rare,
        favourites,
    ],
)
def test_what_is_not_poisson_is_noticed(broken):
    assert not is_poisson(list(broken(np.random.default_rng(0))), N, RATE)


def test_indices_ascend():
    batch = PoissonSampler(num_examples=100, sample_rate=0.5).sample(np.random.default_rng(0))
    assert batch.dtype == torch.int64
    assert all(a < b for a, b in pairwise(batch.tolist()))
    assert batch[0] >= 0
    assert batch[-1] < 100


def test_empty_batches_occur_as_often_as_they_must():
    """Three examples at rate 0.1 all stay away with probability 0.729."""
    sampler = PoissonSampler(num_examples=3, sample_rate=0.1)
    empty = sum(len(b) == 0 for b in sampler.batches(2000, np.random.default_rng(0)))
    assert stats.binomtest(empty, 2000, 0.9**3).pvalue > 1e-4


def test_rate_one_takes_all():
    sampler = PoissonSampler(num_examples=5, sample_rate=1)
    assert all(b.tolist() == [0, 1, 2, 3, 4] for b in sampler.batches(100, np.random.default_rng(0)))


def test_expected_batch_size():
    assert PoissonSampler(num_examples=200, sample_rate=0.25).expected_batch_size == 50


@pytest.mark.parametrize("rate", [0, -0.1, 1.2, float("nan"), float("inf")])
def test_rates_outside_0_1_are_refused(rate):
    with pytest.raises(SettingError, match=r"sample_rate=.* is not in \(0, 1\]; .*more examples"):
        PoissonSampler(num_examples=10, sample_rate=rate)


@pytest.mark.parametrize("num_examples", [0, -1])
def test_no_examples_are_refused(num_examples):
    with pytest.raises(SettingError, match=r"num_examples=.* is not at least 1; "):
        PoissonSampler(num_examples=num_examples, sample_rate=0.1)


def test_batches_are_successive_samples():
    sampler = PoissonSampler(num_examples=20, sample_rate=0.3)
    generator = np.random.default_rng(0)
    expected = [sampler.sample(generator).tolist() for _ in range(5)]
    assert [b.tolist() for b in sampler.batches(5, np.random.default_rng(0))] == expected
    assert list(sampler.batches(0, generator)) == []


def test_batches_drive_a_data_loader_empty_ones_too():
    sampler = PoissonSampler(num_examples=4, sample_rate=0.2)
    expected = [b.tolist() for b in sampler.batches(20, np.random.default_rng(0))]
    assert [] in expected
    data = TensorDataset(torch.arange(8.0).reshape(4, 2), torch.arange(4))
    loader = DataLoader(data, batch_size=None, sampler=sampler.batches(20, np.random.default_rng(0)))
    loaded = list(loader)
    assert [targets.tolist() for _, targets in loaded] == expected
    assert all(inputs.shape == (len(targets), 2) for inputs, targets in loaded)
