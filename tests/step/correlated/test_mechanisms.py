"""The built-in mechanisms against reference numbers, and the noise of their streams against C."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.step.correlated.banded import _loss as loss_of_bands
from fed_dpsat.step.correlated.banded import band_mf
from fed_dpsat.step.correlated.base import Factorization, StreamError, errors
from fed_dpsat.step.correlated.blt import BufferedToeplitz, blt
from fed_dpsat.step.correlated.blt import _loss as loss_of_buffers
from fed_dpsat.step.correlated.blt import _start as start_of_buffers
from fed_dpsat.step.correlated.sensitivity import Participation
from fed_dpsat.step.correlated.toeplitz import Toeplitz, bisr, root_coefficients
from fed_dpsat.step.correlated.tree import Tree

DENSE_OPTIMUM = {1: 2.236, 4: 4.662, 10: 8.618}
"""Mean error of the best factorisation at 100 steps, by 1, 4, 10 participations in a fixed order."""

BANDS = {
    (100, 1, 1): (1, 7.106, 10.00),
    (100, 4, 1): (1, 3.916, 5.340),
    (100, 16, 1): (1, 2.663, 3.357),
    (100, 64, 1): (1, 2.330, 2.677),
    (100, 16, 10): (3.8412, 10.229, 12.895),
    (100, 64, 4): (2.3706, 5.524, 6.346),
    (100, 25, 4): (2, 4.977, 6.076),
    (100, 10, 10): (3.1623, 9.318, 12.119),
    (1000, 4, 1): (1, 11.431, 16.041),
    (1000, 16, 4): (2, 12.556, 17.134),
    (1000, 64, 10): (3.1623, 12.759, 16.360),
    (2000, 64, 1): (1, 5.125, None),
}
BUFFERS = {
    (100, 3, 1): (1.5128, 2.320, 2.606),
    (100, 4, 4): (3.1688, 5.196, 6.352),
    (100, 3, 10): (5.3526, 9.894, 12.787),
    (1000, 3, 1): (1.7434, 3.051, 3.349),
    (1000, 4, 4): (3.6392, 6.654, 7.848),
    (1000, 4, 10): (6.1754, 12.194, 15.187),
    (2000, 4, 10): (6.3660, 12.890, 15.902),
}
BISR = {(100, 4, 1): 3.127, (100, 16, 4): 5.300, (1000, 4, 1): 9.004, (1000, 16, 10): 15.987, (1000, 64, 10): 12.366}
TREE = {(100, 1): (2.6458, 3.734, 5.154), (100, 4): (5.9161, 8.349, 11.526), (1000, 10): (11.874, 20.117, 27.343)}


def spread(n: int, most: int, *, fixed_order: bool = False) -> Participation:
    return Participation(num_steps=n, most=most, min_separation=n // most, fixed_order=fixed_order)


def is_close(found: Factorization, allowed: Participation, wanted: tuple[float, float, float | None]) -> None:
    got = errors(found, allowed)
    assert (got.sensitivity, got.mean) == pytest.approx(wanted[:2], rel=0.01)
    if wanted[2] is not None:
        assert got.largest == pytest.approx(wanted[2], rel=0.01)


@pytest.mark.parametrize(("n", "bands", "most"), BANDS)
def test_bands_have_the_reference_errors(n: int, bands: int, most: int) -> None:
    is_close(band_mf(n, bands), spread(n, most), BANDS[n, bands, most])


@pytest.mark.parametrize(("n", "buffers", "most"), BUFFERS)
def test_buffers_have_the_reference_errors(n: int, buffers: int, most: int) -> None:
    is_close(blt(spread(n, most), buffers), spread(n, most), BUFFERS[n, buffers, most])


@pytest.mark.parametrize(("n", "bands", "most"), BISR)
def test_a_cut_inverse_root_has_the_reference_errors(n: int, bands: int, most: int) -> None:
    assert errors(bisr(n, bands), spread(n, most)).mean == pytest.approx(BISR[n, bands, most], rel=0.01)


@pytest.mark.parametrize(("n", "most"), TREE)
def test_a_tree_has_the_reference_errors(n: int, most: int) -> None:
    is_close(Tree(num_steps=n), spread(n, most, fixed_order=True), TREE[n, most])


def test_given_coefficients_have_the_errors_that_two_implementations_agree_on() -> None:
    one, ten = spread(1000, 1), spread(1000, 10)
    bands = Toeplitz(num_steps=1000, coefficients=np.array([0.5870187856, 0.5035110977, 0.4681882072, 0.4274170358]))
    assert (errors(bands, one).mean, errors(bands, one).largest) == pytest.approx((11.43100, 16.04066), rel=1e-5)
    four = BufferedToeplitz(
        num_steps=1000,
        theta=np.array([0.9972008251, 0.9723026753, 0.8569412600, 0.4496846971]),
        omega=np.array([0.0667544178, 0.0930873759, 0.1688329755, 0.1720281810]),
    )
    assert (errors(four, one).sensitivity, errors(four, one).mean) == pytest.approx((1.7442, 3.050), rel=2e-4)
    two = BufferedToeplitz(
        num_steps=1000, theta=np.array([0.9816634886, 0.5777680889]), omega=np.array([0.2502350362, 0.2573453727])
    )
    assert (errors(two, ten).sensitivity, errors(two, ten).mean) == pytest.approx((6.1749, 12.194), rel=1e-4)


def test_the_square_root_has_the_square_of_its_sensitivity_as_largest_error() -> None:
    root = errors(Toeplitz(num_steps=1000, coefficients=root_coefficients(1000)), spread(1000, 1))
    assert root.largest == pytest.approx(root.sensitivity**2)
    assert root.mean == pytest.approx(3.102, rel=1e-3)


@pytest.mark.parametrize("most", [1, 4, 10])
def test_no_error_is_below_that_of_the_best_factorisation(most: int) -> None:
    allowed = spread(100, most)
    for found in (band_mf(100, 100 // most), blt(allowed, 3), bisr(100, 4), bisr(100, 64), Tree(num_steps=100)):
        assert errors(found, allowed).mean > DENSE_OPTIMUM[most]


@pytest.mark.parametrize("bands", [2, 4, 16])
def test_a_fit_is_better_than_its_start(bands: int) -> None:
    start = Toeplitz(num_steps=200, coefficients=root_coefficients(bands))
    assert errors(band_mf(200, bands), spread(200, 1)).mean < errors(start, spread(200, 1)).mean


@pytest.mark.parametrize("of", ["bands", "buffers"])
def test_gradients_are_those_of_differences(of: str) -> None:
    def of_bands(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        return loss_of_bands(np.concatenate([[1.0], x]), np.arange(60, 0, -1) / 60)

    def of_buffers(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        return loss_of_buffers(x, spread(60, 4))

    loss: Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]] = of_bands if of == "bands" else of_buffers
    x = root_coefficients(5)[1:] if of == "bands" else start_of_buffers(60, 3)
    for i, slope in enumerate(loss(x)[1]):
        step = np.zeros(len(x))
        step[i] = 1e-6
        assert slope == pytest.approx((loss(x + step)[0] - loss(x - step)[0]) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("found", [blt(spread(500, 5), 4), bisr(2000, 4), bisr(2000, 64)])
def test_coefficients_fall_and_are_not_negative(found: Toeplitz) -> None:
    c = found.column
    assert (c >= 0).all()
    assert (np.diff(c) <= 1e-15).all()


ALL: dict[str, Callable[[int], Factorization]] = {
    "one band": lambda n: band_mf(n, 1),
    "band-mf": lambda n: band_mf(n, 4),
    "blt": lambda n: blt(spread(n, 1), 3),
    "bisr": lambda n: bisr(n, 4),
    "tree": lambda n: Tree(num_steps=n),
}


def drawn(factorization: Factorization, size: int) -> tuple[NDArray[np.float64], list[Tensor]]:
    """``[n, size]`` of noise, and the normals it is of."""
    torch.manual_seed(0)
    stream, normals = factorization.stream(), []

    def draw() -> Tensor:
        normals.append(torch.randn(size, dtype=torch.float64))
        return normals[-1].clone()

    steps = range(1, factorization.num_steps + 1)
    return np.stack([stream.next(draw, step).numpy() for step in steps]), normals


@pytest.mark.parametrize("name", ["band-mf", "blt", "bisr"])
def test_a_stream_solves_for_c(name: str) -> None:
    factorization = ALL[name](23)
    assert isinstance(factorization, Toeplitz)
    noise, normals = drawn(factorization, 5)
    c = factorization.column
    matrix = np.array([[c[i - j] if i >= j else 0.0 for j in range(23)] for i in range(23)])
    np.testing.assert_allclose(matrix @ noise, torch.stack(normals).numpy(), atol=1e-12)
    inverse = factorization.inverse_column
    np.testing.assert_allclose(matrix @ np.concatenate([inverse]), np.eye(23)[0], atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_noise_has_the_covariance_of_its_mechanism(name: str) -> None:
    """Over many coordinates: of a step, of a partial sum, and of neighbours, whose noise cancels."""
    factorization = ALL[name](16)
    noise, _ = drawn(factorization, 40_000)
    tolerance = 5 * math.sqrt(2 / 40_000)
    np.testing.assert_allclose(noise.var(axis=1) / factorization.deviations() ** 2, 1, atol=tolerance)
    sums = np.cumsum(noise, axis=0)
    np.testing.assert_allclose(sums.var(axis=1) / factorization.prefix_variances(), 1, atol=tolerance)
    assert (np.abs(sums.var(axis=1) / factorization.prefix_variances() / 0.9 - 1) > tolerance).all()
    if isinstance(factorization, Toeplitz):
        r = factorization.inverse_column
        inverse = np.array([[r[i - j] if i >= j else 0.0 for j in range(16)] for i in range(16)])
        np.testing.assert_allclose(noise @ noise.T / 40_000, inverse @ inverse.T, atol=2 * tolerance)


def test_a_tree_of_four_steps_by_hand() -> None:
    noise, z = drawn(Tree(num_steps=4), 1)
    values = [float(one) for one in z]
    leaf1, leaf2, pair12, leaf3, leaf4, pair34, top = values
    of12, of34 = 2 / 3 * pair12 + (leaf1 + leaf2) / 3, 2 / 3 * pair34 + (leaf3 + leaf4) / 3
    whole = 4 / 7 * top + 3 / 7 * (of12 + of34)
    np.testing.assert_allclose(np.cumsum(noise[:, 0]), [leaf1, of12, of12 + leaf3, whole])


@pytest.mark.parametrize("name", ALL)
def test_a_stream_gives_each_step_once_and_none_beyond_the_last(name: str) -> None:
    stream = ALL[name](5).stream()

    def never() -> Tensor:
        raise AssertionError("drawn")

    with pytest.raises(StreamError, match="step 2 was asked after step 0"):
        stream.next(never, 2)
    for step in range(1, 6):
        stream.next(lambda: torch.randn(3), step)
    with pytest.raises(StreamError, match="covers 5 steps, and step 6"):
        stream.next(never, 6)
    with pytest.raises(StreamError, match="each step once"):
        stream.next(never, 5)


def test_one_band_is_the_draw_itself() -> None:
    normals = torch.randn(7)
    assert band_mf(3, 1).stream().next(lambda: normals, 1) is normals


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: band_mf(10, 11), "noise_bands=11"),
        (lambda: bisr(10, 0), "noise_bands=0"),
        (lambda: blt(spread(10, 1), 9), "noise_buffers=9"),
    ],
)
def test_impossible_sizes_are_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(SettingError, match=match):
        make()
