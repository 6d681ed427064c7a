"""The suite of correlated noise accepts what ships, and finds what is wrong with others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fed_dpsat import RunConfig
from fed_dpsat.errors import SettingError
from fed_dpsat.plugins import PluginError
from fed_dpsat.step.correlated.banded import band_mf
from fed_dpsat.step.correlated.base import Draw, Stream
from fed_dpsat.step.correlated.blt import blt
from fed_dpsat.step.correlated.choose import factorization_of, participation_of
from fed_dpsat.step.correlated.measured import Measured
from fed_dpsat.step.correlated.sensitivity import Participation
from fed_dpsat.step.correlated.toeplitz import Toeplitz, bisr, independent
from fed_dpsat.testing import ConformanceError, check_noise

OWN = """
from fed_dpsat.step.correlated.base import Stream


class Halves(Stream):
    earlier = None

    def _next(self, draw):
        drawn = draw()
        noise = drawn if self.earlier is None else drawn - 0.5 * self.earlier
        self.earlier = noise
        return noise


class Mechanism:
    def __init__(self, num_steps):
        self.num_steps = num_steps

    def stream(self):
        return Halves(self.num_steps)
"""


@pytest.mark.parametrize(
    "make",
    [lambda n: band_mf(n, 3), lambda n: bisr(n, 4), independent]
    + [lambda n: blt(Participation(num_steps=n, most=1, min_separation=n), 2)],
)
def test_built_in_noise_passes(make: Callable[[int], Any]) -> None:
    assert len(check_noise(make)) == 5


class _Halves(Stream):
    earlier: Tensor | None = None

    def _next(self, draw: Draw) -> Tensor:
        drawn = draw()
        self.earlier = drawn if self.earlier is None else drawn - 0.5 * self.earlier
        return self.earlier


class _Nonlinear(_Halves):
    def _next(self, draw: Draw) -> Tensor:
        return super()._next(draw).clamp(max=0.5)


class _DrawsTwice(_Halves):
    def _next(self, draw: Draw) -> Tensor:
        return (draw() + draw()) / math.sqrt(2)


class _Forgets(_Halves):
    def _next(self, draw: Draw) -> Tensor:
        drawn, earlier = draw(), self.earlier
        self.earlier = drawn
        return drawn if earlier is None else earlier


class _Mixes(_Halves):
    def _next(self, draw: Draw) -> Tensor:
        noise = super()._next(draw)
        return noise + 0.1 * noise.roll(1) if len(noise) > 1 and len(noise) != 9 else noise


class _AnyStep(_Halves):
    def check(self, step: int) -> None:
        pass


_SHARED = _Halves(9)


class _Shared(_Halves):
    def _next(self, draw: Draw) -> Tensor:
        _SHARED.earlier = None if self.taken == 1 else _SHARED.earlier
        return _SHARED._next(draw)


@dataclass
class _Of:
    kind: type[Stream]
    num_steps: int

    def stream(self) -> Stream:
        return self.kind(self.num_steps)


class _Underrated(_Of):
    def sensitivity(self, participation: Participation) -> float:
        return math.sqrt(participation.most)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (lambda n: _Of(_Nonlinear, n), "matrix_of_its_draws"),
        (lambda n: _Of(_DrawsTwice, n), "matrix_of_its_draws"),
        (lambda n: _Of(_Forgets, n), "matrix_of_its_draws"),
        (lambda n: _Of(_Mixes, n), "in_each_coordinate"),
        (lambda n: _Of(_Shared, n), "share_nothing"),
        (lambda n: _Of(_AnyStep, n), "each_step_once"),
        (lambda n: _Underrated(_Halves, n), "all_patterns"),
    ],
)
def test_wrong_noise_is_found(make: Callable[[int], Any], check: str) -> None:
    with pytest.raises(ConformanceError, match=check):
        check_noise(make)


def test_a_mechanism_of_ones_own_is_measured_and_not_believed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    config = RunConfig(
        privacy_unit="client",
        noise_mechanism=f"{tmp_path / 'own.py'}:Mechanism",
        noise_multiplier=1.0,
        num_rounds=12,
        num_clients=12,
        clients_per_round=3,
        min_separation=4,
        max_rounds_per_client=3,
    )
    found = factorization_of(config)
    assert isinstance(found, Measured)
    assert len(check_noise(lambda n: _Of(_Halves, n))) == 5
    same = Toeplitz(num_steps=12, coefficients=np.array([1.0, 0.5]))
    assert found.sensitivity(participation_of(config)) == pytest.approx(same.sensitivity(participation_of(config)))
    np.testing.assert_allclose(found.prefix_variances(), same.prefix_variances())
    np.testing.assert_allclose(found.deviations(), same.deviations())
    with pytest.raises(PluginError, match="no linear function"):
        Measured.of(_Of(_Nonlinear, 5), 5)
    with pytest.raises(SettingError, match="num_rounds=1001"):
        Measured.of(_Of(_Halves, 1001), 1001)
    assert torch.equal(found.stream().next(lambda: torch.ones(2), 1), torch.ones(2))
