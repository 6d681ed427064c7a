"""The other rules by hand: what each makes of an example with two layers of norms 3 and 4."""

from __future__ import annotations

import math

import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.clipping.global_ import GlobalClipping
from fed_dpsat.step.clipping.per_layer import PerLayerClipping
from fed_dpsat.step.clipping.psac import PSACClipping

SQUARES = {"a.weight": torch.tensor([9.0, 0.0]), "b.weight": torch.tensor([16.0, 1e-4])}


def test_automatic_scales_every_example_to_nearly_the_bound():
    factors = AutomaticClipping(clip_norm=2.0).factors(SQUARES)
    torch.testing.assert_close(factors["a.weight"], torch.tensor([2 / 5.01, 2 / 0.02]))


def test_automatic_reaches_the_bound_as_the_norm_grows():
    factor = AutomaticClipping(clip_norm=2.0).factors({"w": torch.tensor([1e12])})["w"]
    assert float(factor) * 1e6 == pytest.approx(2.0, rel=1e-6)


def test_global_gives_all_the_same_factor_and_drops_the_large():
    factors = GlobalClipping(clip_norm=2.0, global_threshold=4.0).factors(SQUARES)
    torch.testing.assert_close(factors["b.weight"], torch.tensor([0.0, 0.5]))


def test_per_layer_gives_each_layer_its_share():
    factors = PerLayerClipping(clip_norm=1.0).factors(SQUARES)
    share = 1 / math.sqrt(2)
    torch.testing.assert_close(factors["a.weight"], torch.tensor([share / 3, 1.0]))
    torch.testing.assert_close(factors["b.weight"], torch.tensor([share / 4, 1.0]))


def test_weight_and_bias_of_a_module_are_one_layer():
    factors = PerLayerClipping(clip_norm=1.0).factors({"a.weight": torch.tensor([9.0]), "a.bias": torch.tensor([16.0])})
    torch.testing.assert_close(factors["a.bias"], torch.tensor([0.2]))


def test_psac_gives_a_small_gradient_a_small_weight():
    """Norms 5 and 0.01: 2 / (5 + 0.1 / 5.1) and 2 / (0.01 + 0.1 / 0.11)."""
    factors = PSACClipping(clip_norm=2.0).factors(SQUARES)
    torch.testing.assert_close(factors["b.weight"], torch.tensor([2 / (5 + 0.1 / 5.1), 2 / (0.01 + 0.1 / 0.11)]))


def test_the_weight_of_psac_is_largest_between():
    """C at 0, and C / (2 sqrt(r) - r) = C / 0.19 at |g| = sqrt(r) - r = 0.09, for r = 0.01."""
    norms = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    weight = PSACClipping(clip_norm=1.0, r=0.01).factors({"w": norms**2})["w"]
    assert weight[0] == pytest.approx(1)
    assert weight.max() == pytest.approx(1 / 0.19)
    assert norms[weight.argmax()] == pytest.approx(0.09)


@pytest.mark.parametrize("s", [0.3, 1.0, 3.0])
def test_psasc_keeps_the_bound_that_noise_is_scaled_to(s):
    """As its authors write it, with C = 2 s, the bound would be C / s = 2; r to 0 is normalisation."""
    norms = torch.logspace(-6, 6, 200, dtype=torch.float64)
    clipped = PSACClipping(clip_norm=2.0, r=0.1, s=s).factors({"w": norms**2})["w"] * norms
    torch.testing.assert_close(clipped, 2 * s * norms / (s * norms + 0.1 / (norms + 0.1)))
    assert clipped.max() < 2
    tiny = PSACClipping(clip_norm=2.0, r=1e-12, s=s).factors({"w": norms[100:] ** 2})["w"] * norms[100:]
    torch.testing.assert_close(tiny, torch.full_like(tiny, 2.0))


@pytest.mark.parametrize(("name", "value"), [("r", 0.0), ("r", 1.5), ("s", 0.0), ("s", math.inf)])
def test_an_argument_of_psac_out_of_bounds_is_refused(name, value):
    with pytest.raises(SettingError, match=rf"^{name}={value} is not in \(0, 1(00)?\]"):
        PSACClipping(clip_norm=1.0, **{name: value})


@pytest.mark.parametrize("rule", [AutomaticClipping, GlobalClipping, PerLayerClipping, PSACClipping])
def test_rules_that_scale_to_the_bound_need_one(rule):
    with pytest.raises(SettingError, match="finite"):
        rule(clip_norm=math.inf)


def test_a_threshold_that_is_none_is_refused():
    with pytest.raises(SettingError, match=r"global_threshold=0.0 is not above 0"):
        GlobalClipping(clip_norm=1.0, global_threshold=0.0)
