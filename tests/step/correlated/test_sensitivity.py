"""Sensitivity against every pattern, every sign, and the mistakes of public code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fed_dpsat.errors import SettingError
from fed_dpsat.step.correlated.sensitivity import Participation, matrix_sensitivity, toeplitz_sensitivity
from fed_dpsat.step.correlated.toeplitz import Toeplitz, bisr, root_coefficients
from fed_dpsat.step.correlated.tree import Tree
from fed_dpsat.testing.correlated import worst_pattern

N = 12
PATTERNS = [(1, 12), (2, 6), (4, 3), (3, 4), (3, 2), (3, 1), (2, 5)]
SIGNED = np.array([1, -0.2, 0.6, -0.5, 0.3])


def participation(most: int, apart: int, *, n: int = N, fixed_order: bool = False) -> Participation:
    return Participation(num_steps=n, most=most, min_separation=apart, fixed_order=fixed_order)


def toeplitz(c: NDArray[np.float64], n: int = N) -> NDArray[np.float64]:
    full = np.concatenate([c, np.zeros(n - len(c))])
    return np.array([[full[i - j] if i >= j else 0.0 for j in range(n)] for i in range(n)])


def of_coefficients(c: NDArray[np.float64], allowed: Participation) -> float:
    return toeplitz_sensitivity(np.concatenate([c, np.zeros(allowed.num_steps - len(c))]), allowed)


@pytest.mark.parametrize(("most", "apart"), PATTERNS)
@pytest.mark.parametrize("c", [root_coefficients(N), np.array([1.0]), np.array([1.0, 0.5, 0.5, 0.1])])
def test_falling_coefficients_have_the_exact_sensitivity(c: NDArray[np.float64], most: int, apart: int) -> None:
    allowed = participation(most, apart)
    assert of_coefficients(c, allowed) == pytest.approx(worst_pattern(toeplitz(c), allowed))


@pytest.mark.parametrize(("most", "apart"), PATTERNS)
def test_signed_coefficients_are_bounded_and_not_underrated(most: int, apart: int) -> None:
    allowed = participation(most, apart)
    exact = worst_pattern(toeplitz(SIGNED), allowed)
    found = of_coefficients(SIGNED, allowed)
    assert found >= exact - 1e-12
    if len(SIGNED) <= apart:
        assert found == pytest.approx(exact)


def test_the_formula_for_falling_coefficients_is_no_bound_for_others() -> None:
    allowed = participation(4, 3)
    column = np.concatenate([SIGNED, np.zeros(N - 5)])
    assert np.linalg.norm(allowed.sum_of_shifts(column)) == pytest.approx(1.806, abs=1e-3)
    assert worst_pattern(toeplitz(SIGNED), allowed) == pytest.approx(3.159, abs=1e-3)


@pytest.mark.parametrize(("most", "apart"), PATTERNS)
@pytest.mark.parametrize("fixed_order", [False, True])
def test_any_matrix_is_bounded(most: int, apart: int, fixed_order: bool) -> None:
    allowed = participation(most, apart, fixed_order=fixed_order)
    matrix = np.tril(np.random.default_rng(0).normal(size=(N, N)))
    positive = np.abs(matrix)
    assert matrix_sensitivity(matrix, allowed) >= worst_pattern(matrix, allowed) - 1e-12
    exact = worst_pattern(positive, allowed)
    found = matrix_sensitivity(positive, allowed)
    assert exact - 1e-12 <= found <= exact * (1 + 1e-9 if fixed_order else 1.1)


@pytest.mark.parametrize(("most", "apart"), PATTERNS)
def test_a_diagonal_matrix_has_its_heaviest_steps(most: int, apart: int) -> None:
    matrix = np.diag(np.random.default_rng(1).uniform(0.5, 2, N))
    allowed = participation(most, apart)
    assert matrix_sensitivity(matrix, allowed) == pytest.approx(worst_pattern(matrix, allowed))


@pytest.mark.parametrize(("most", "apart"), PATTERNS)
@pytest.mark.parametrize("fixed_order", [False, True])
def test_a_tree_counts_its_nodes(most: int, apart: int, fixed_order: bool) -> None:
    allowed = participation(most, apart, fixed_order=fixed_order)
    nodes = [
        [float(start <= step < start + size) for step in range(N)]
        for size in (1, 2, 4, 8)
        for start in range(0, N - size + 1, size)
    ]
    exact = worst_pattern(np.array(nodes), allowed)
    found = Tree(num_steps=N).sensitivity(allowed)
    assert exact - 1e-12 <= found <= exact * (1 + 1e-9 if fixed_order else 1.1)


def test_coefficients_are_never_taken_for_all_steps() -> None:
    """16 bands over 1000 steps, 10 participations: without the number of steps the sensitivity comes out as 1."""
    short = root_coefficients(16) / np.linalg.norm(root_coefficients(16))
    with pytest.raises(ValueError, match="16 coefficients for 1000 steps"):
        toeplitz_sensitivity(short, participation(10, 100, n=1000))
    whole = Toeplitz(num_steps=1000, coefficients=short)
    assert whole.sensitivity(participation(10, 100, n=1000)) == pytest.approx(math.sqrt(10))


def test_other_participations_have_other_sensitivities() -> None:
    c = bisr(100, 8)
    found = [c.sensitivity(participation(most, apart, n=100)) for most, apart in [(1, 100), (2, 50), (4, 25), (4, 10)]]
    assert found == sorted(found)
    assert len({round(value, 6) for value in found}) == 4


def test_a_longer_run_never_has_a_smaller_sensitivity() -> None:
    found = []
    for n in range(10, 61, 10):
        found.append(bisr(n, 4).sensitivity(participation(n // 10, 10, n=n)))
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("most", "apart", "match"), [(5, 3, "participations=5"), (0, 3, "most=0"), (1, 0, "separation=0")]
)
def test_impossible_patterns_are_refused(most: int, apart: int, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        participation(most, apart)
