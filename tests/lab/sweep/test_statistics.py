"""Means, deviations and intervals against numbers from a table of Student's t."""

from __future__ import annotations

import pytest

from fed_dpsat.lab.sweep.statistics import deviation, difference, half_width, spread


def test_three_values_by_hand():
    """sd of 1, 2, 3 is 1; t(0.975, 2) = 4.3027; 4.3027 / sqrt(3) = 2.4841."""
    assert deviation([1.0, 2.0, 3.0]) == 1.0
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.4841, abs=1e-4)
    assert spread([1.0, 2.0, 3.0]) == "2.0 (1.0)"


def test_one_value_has_no_deviation_and_no_interval():
    assert deviation([1.0]) is None
    assert half_width([1.0]) is None
    assert (spread([1.0]), spread([]), difference([1.0], [0.5]), difference([], [])) == ("1.0", "-", "+0.5", "-")


def test_a_difference_is_paired_and_bold_only_where_its_interval_leaves_zero_out():
    assert difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == "+2.0 ± 2.5"
    assert difference([12.0, 22.0, 32.1], [10.0, 20.0, 30.0]) == "**+2.0 ± 0.1**"
    with pytest.raises(ValueError, match="zip"):
        difference([1.0], [1.0, 2.0])
