"""The other rules by hand: what each makes of an example with two layers of norms 3 and 4."""

from __future__ import annotations

import math

import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.clipping.global_ import GlobalClipping
from fed_dpsat.step.clipping.per_layer import PerLayerClipping

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


@pytest.mark.parametrize("rule", [AutomaticClipping, GlobalClipping, PerLayerClipping])
def test_rules_that_scale_to_the_bound_need_one(rule):
    with pytest.raises(SettingError, match="finite"):
        rule(clip_norm=math.inf)


def test_a_threshold_that_is_none_is_refused():
    with pytest.raises(SettingError, match=r"global_threshold=0.0 is not above 0"):
        GlobalClipping(clip_norm=1.0, global_threshold=0.0)
