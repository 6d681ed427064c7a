"""The scattering transform: equal to kymatio's, and of each example by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fed_dpsat.data import scattering
from fed_dpsat.data.scattering import Scattering
from fed_dpsat.errors import DataError

FIGURES = json.loads(Path(__file__).with_name("scattering").joinpath("figures.json").read_text())
"""By kymatio 0.3.0; ``scattering/make_figures.py`` wrote them."""


def made_up(height, width):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((3 * y + 5 * x) % 11 / 10 + y / height) / 2


@pytest.mark.parametrize("case", FIGURES, ids=lambda case: f"{case['shape']}-{case['scales']}")
def test_each_path_is_that_of_kymatio(case):
    found = Scattering(case["scales"], case["angles"])(made_up(*case["shape"])[None, None])[0]
    for (row, column), values in zip(case["places"], case["values"], strict=True):
        assert (found[:, row, column] - torch.tensor(values)).abs().max() < 1e-5  # rounded to 1e-6


def test_a_constant_image_has_its_colour_and_no_edges():
    """By hand: a low-pass filter keeps a constant, and a wavelet has none."""
    found = Scattering()(torch.full((1, 1, 12, 12), 0.7))
    assert found.shape == (1, 81, 3, 3)
    assert (found[:, 0] - 0.7).abs().max() < 1e-4
    assert found[:, 1:].abs().max() < 1e-5


def test_the_paths_of_a_channel_stand_together():
    x = torch.rand(2, 3, 9, 9)
    found = Scattering()(x).view(2, 3, 81, 2, 2)
    for channel in range(3):
        assert torch.equal(found[:, channel], Scattering()(x[:, channel : channel + 1]))


def test_an_example_has_the_same_bits_alone_and_beside_others():
    """Also at the border between two parts that are transformed one after the other."""
    x = torch.rand(2 * scattering.CHUNK + 3, 1, 8, 8)
    whole = Scattering()(x)
    order = torch.randperm(len(x))
    assert torch.equal(Scattering()(x[order]), whole[order])
    assert torch.equal(torch.cat([Scattering()(one[None]) for one in x]), whole)


@pytest.mark.parametrize("shape", [(3, 2, 8), (3, 1, 3, 8), (3, 8)])
def test_other_inputs_than_images_are_refused(shape):
    with pytest.raises(DataError, match=r"takes images \[N, C, H, W\] with sides of 4 or more, not inputs \[3, "):
        Scattering()(torch.rand(shape))


@pytest.mark.parametrize("case", FIGURES, ids=lambda case: f"{case['shape']}-{case['scales']}")
def test_without_a_compiler_the_numbers_are_the_same(case, monkeypatch):
    image = made_up(*case["shape"])[None, None]
    transform = Scattering(case["scales"], case["angles"])
    compiled = transform(image)
    bank = scattering._bank(*case["shape"], case["scales"], case["angles"], torch.device("cpu"))
    if not bank.compiled:
        pytest.skip("no C compiler")
    monkeypatch.setattr(bank, "compiled", False)
    assert (transform(image) - compiled).abs().max() < 1e-6
    assert not torch.equal(transform(image), compiled)  # another way


@pytest.mark.parametrize("arguments", [{"scales": 0}, {"scales": 1.5}, {"angles": "a"}, {"scales": True}])
def test_counts_that_are_none_are_refused_by_name(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(DataError, match=f"{name}={value!r}.* not whole numbers of at least 1; 2 and 8 are usual"):
        Scattering(**arguments)
