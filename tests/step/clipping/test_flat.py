import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed_dpsat.errors import SettingError
from fed_dpsat.plugins import builtin
from fed_dpsat.step.clipping import FlatClipping, check_clip_norm

CLIPPING = builtin("clipping")

NORMS = st.lists(st.floats(0, 2.0**60, width=32), min_size=1, max_size=4)
"""Norms of one example's gradient, parameter by parameter; their squares fit float32."""


def clipped_norm(rule, norms):
    """Norm, over all parameters together, of what the rule leaves of an example with these ``norms``."""
    tensors = {str(i): torch.tensor([n], dtype=torch.float32) for i, n in enumerate(norms)}
    factors = rule.factors({name: n.square() for name, n in tensors.items()})
    assert factors.keys() == tensors.keys()
    return math.hypot(*(float(factors[name]) * float(n) for name, n in tensors.items()))


class PerTensor(FlatClipping):
    """Wrong: each tensor is clipped to C, so the example to C * sqrt(number of tensors)."""

    def factors(self, squared_norms):
        return {name: (self.clip_norm / n.sqrt()).clamp(max=1) for name, n in squared_norms.items()}


def test_flat_by_hand():
    """Norms over both parameters: 5, 0.5, 0, 1; clipped at 1."""
    squares = {"a": torch.tensor([9.0, 0.09, 0.0, 1.0]), "b": torch.tensor([16.0, 0.16, 0.0, 0.0])}
    factors = FlatClipping(clip_norm=1).factors(squares)
    for factor in factors.values():
        torch.testing.assert_close(factor, torch.tensor([0.2, 1.0, 1.0, 1.0]))


def test_flat_without_a_bound_changes_nothing():
    factors = FlatClipping(clip_norm=math.inf).factors({"a": torch.tensor([0.0, 1.0, 1e38])})
    assert factors["a"].tolist() == [1, 1, 1]


def test_a_batch_of_none():
    assert FlatClipping(clip_norm=1).factors({"a": torch.zeros(0)})["a"].shape == (0,)


@pytest.mark.parametrize("name", CLIPPING)
@given(norms=NORMS, clip_norm=st.floats(1e-3, 1e3))
def test_every_rule_bounds_an_example(name, norms, clip_norm):
    assert clipped_norm(CLIPPING[name](clip_norm=clip_norm), norms) <= clip_norm * (1 + 1e-6)


def test_a_rule_that_clips_per_tensor_is_noticed():
    assert clipped_norm(PerTensor(clip_norm=1), [1e4] * 4) == pytest.approx(2)


@given(norms=NORMS)
def test_flat_only_scales_down_what_is_above_the_bound(norms):
    before = math.hypot(*norms)
    assert clipped_norm(FlatClipping(clip_norm=1), norms) == pytest.approx(min(before, 1), rel=1e-5, abs=1e-15)


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize("bad", [0, -1, math.nan, -math.inf])
def test_a_bound_that_is_none_is_refused(name, bad):
    with pytest.raises(SettingError, match=r"clip_norm=.* is not above 0; "):
        CLIPPING[name](clip_norm=bad)


def test_no_bound_is_a_choice():
    check_clip_norm(math.inf)
