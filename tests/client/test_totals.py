"""The noise of totals over clients: whose it is, how much, and that another amount is found."""

import math

import numpy as np
import pytest
from scipy import stats

from fed_dpsat.client import totals
from fed_dpsat.settings.config import RunConfig

CLIENTS, WIDTH, NOISE = 20, 250, 3.0


def config(unit="example", source="seeded", seed=0):
    return RunConfig(privacy_unit=unit, noise_source=source, seed=seed, num_clients=CLIENTS, target_epsilon=8.0)


def fits(unit, source, seeds=8, noise=NOISE):
    """Whether the noise of two lines of ``WIDTH`` numbers has the deviation that is stated, at a level of 1e-4."""
    numbers = np.concatenate(
        [
            one
            for seed in range(seeds)
            for one in totals.noised_totals(
                {name: np.zeros((CLIENTS, WIDTH)) for name in "ab"}, noise, config(unit, source, seed), "statistics"
            ).values()
        ]
    )
    scaled = numbers / totals.noise_of_totals(2, NOISE, config(unit))
    statistic, n = float((scaled**2).sum()), len(scaled)
    return 1e-4 < stats.chi2.cdf(statistic, n) < 1 - 1e-4 and stats.kstest(scaled, "norm").pvalue > 1e-4


@pytest.mark.parametrize("source", ["seeded", "system"])
@pytest.mark.parametrize("unit", ["example", "client"])
def test_the_noise_is_what_the_event_says_and_half_of_it_is_found(unit, source):
    assert fits(unit, source)
    assert not fits(unit, source, noise=NOISE / 2)
    assert not fits(unit, source, noise=NOISE * 0.9)


def test_each_client_adds_noise_of_its_own(monkeypatch):
    """And in each round and attempt another one; the sums themselves are in the total."""
    own, privatize = [], totals.GaussianMechanism.privatize

    def record(mechanism, sums, generator):
        found = privatize(mechanism, sums, generator)
        own.append(found["lines"] - sums["lines"])
        return found

    monkeypatch.setattr(totals.GaussianMechanism, "privatize", record)
    added, three = {"a": np.arange(6.0).reshape(3, 2)}, RunConfig(num_clients=3, target_epsilon=8.0)
    total = totals.noised_totals(added, 1.0, three, "evaluation", round=1)["a"]
    np.testing.assert_allclose(total, added["a"].sum(0) + np.sum([one.numpy() for one in own], axis=0))
    totals.noised_totals(added, 1.0, three, "evaluation", round=2)
    totals.noised_totals(added, 1.0, three, "evaluation", round=2, attempt=1)
    assert len({tuple(one.tolist()) for one in own}) == 9
    assert all(one.abs().min() > 0 for one in own)


def test_lines_share_one_mechanism_of_their_norm_together():
    """L lines of norm 1 are a vector of norm sqrt(L): each number has noise z sqrt(L)."""
    one, four = (totals.noise_of_totals(n, 2.0, config("client")) for n in (1, 4))
    assert (one, four) == (2.0, 4.0)
    assert totals.noise_of_totals(1, 2.0, config()) == pytest.approx(2.0 * math.sqrt(CLIENTS))
