from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from fed_dpsat.flower.cohort import draw_cohort, toss_cohort

ROUNDS = 3000


def cohorts(draw):
    """How often each pair of six clients was asked together in three of six."""
    together = dict.fromkeys(combinations(range(6), 2), 0)
    for r in range(ROUNDS):
        for pair in combinations(draw(r), 2):
            together[pair] += 1
    return together


def is_uniform(together):
    """Each pair is in 4 of the 20 cohorts of three; p from the chi-square of the 15 counts.

    The counts of one round are not independent, so each pair is tested by itself.
    """
    return min(stats.binomtest(count, ROUNDS, 4 / 20).pvalue for count in together.values()) > 1e-4


def test_all_pairs_are_asked_equally_often():
    assert is_uniform(cohorts(lambda r: draw_cohort(0, r, range(6), 3)))


@pytest.mark.parametrize(
    "broken", [lambda r: (0, 1, 2), lambda r: [(0, 1, 2), (3, 4, 5)][r % 2], lambda r: sorted([r % 5, 5, (r + 1) % 5])]
)
def test_cohorts_that_are_not_uniform_are_noticed(broken):
    assert not is_uniform(cohorts(broken))


@pytest.mark.parametrize("size", [0, 1, 3, 9])
def test_a_cohort_has_distinct_eligible_clients_in_order(size):
    eligible = {3, 1, 4, 15, 9, 2, 6, 5, 35, 8}
    for r in range(20):
        cohort = draw_cohort(0, r, eligible, size)
        assert len(cohort) == size
        assert set(cohort) <= eligible
        assert cohort == sorted(set(cohort))
        assert all(type(client) is int for client in cohort)


@pytest.mark.parametrize("size", [3, 4, 100])
def test_all_are_asked_where_no_more_are_left(size):
    assert draw_cohort(0, 1, [7, 2, 5], size) == [2, 5, 7]


def test_nobody_is_left():
    assert draw_cohort(0, 1, [], 3) == []


def test_equal_arguments_draw_the_same_in_any_order():
    assert draw_cohort(5, 2, range(100), 10) == draw_cohort(5, 2, list(range(99, -1, -1)), 10)
    assert draw_cohort(5, 2, range(100), 10) == draw_cohort(5, 2, set(range(100)), 10)


def test_rounds_and_seeds_differ_and_do_not_move_global_generators():
    np.random.seed(0)
    before = np.random.get_state()[1]
    drawn = {tuple(draw_cohort(seed, r, range(1000), 10)) for seed in range(5) for r in range(20)}
    assert len(drawn) == 100
    assert (np.random.get_state()[1] == before).all()


def test_tossed_cohorts_are_coins_of_their_own():
    cohorts = [toss_cohort(0, r, range(10), 0.3) for r in range(3000)]
    joined = np.array([[client in cohort for client in range(10)] for cohort in cohorts], dtype=float)
    np.testing.assert_allclose(joined.mean(0), 0.3, atol=0.04)
    sizes = joined.sum(1)
    assert abs(sizes.var() - 10 * 0.3 * 0.7) < 0.3  # a fixed size has none
    assert abs(np.corrcoef(joined.T)[np.triu_indices(10, 1)]).max() < 0.1
    assert toss_cohort(0, 1, range(10), 1.0) == list(range(10))
