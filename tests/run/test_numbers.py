from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from fed_dpsat.run.metric import metric_named
from fed_dpsat.run.numbers import (
    duration,
    estimate,
    in_unit,
    on_terminal,
    percent,
    plain,
    rounded,
    size,
    spread_out,
    wilson,
)
from fed_dpsat.tasks.metric import UNDEFINED, Metric


def test_mean_and_interval_by_hand():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3))  # t of 97.5 % with 2 degrees of freedom
    assert (found.low, found.high) == pytest.approx((2 - 2.484138, 2 + 2.484138))


def test_one_value_has_no_interval():
    assert estimate([0.5]).mean == 0.5
    assert math.isnan(estimate([0.5]).half_width)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (9, 10), (328, 360), (360, 360)])
def test_wilson_is_that_of_scipy(hits, n):
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-7)


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (91.1111, 2.9, "91.1"),
        (91.1111, 4.0, "91"),
        (0.0349, 0.0123, "0.035"),
        (54.912, 0.31, "54.9"),
        (54.912, 12, "55"),
    ],
)
def test_digits_are_those_that_the_interval_supports(value, half, text):
    assert rounded(value, half) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.0, "3.00"),
        (0.03486, "0.0349"),
        (1234567.0, "1.23e+06"),
        (1234, "1,234"),
        (math.inf, "∞"),
        (0.0, "0"),
        (0.99996, "1.00"),
        ("a", "a"),
    ],
)
def test_plain_numbers(value, text):
    assert plain(value) == text


def test_what_is_not_known_is_a_dash():
    assert plain(None) == plain(math.nan) == percent(None) == percent(math.nan) == "\u2013"


def test_units():
    assert (size(26000), size(12), duration(2.728), duration(600)) == ("26.0 kB", "12 B", "2.73 s", "10 min")
    assert percent(0.9111, 360) == "91.1 %"
    assert percent(0.9111, 10**6) == "91.11 %"


def test_rows_are_spread_and_hold_both_ends():
    assert spread_out(3, 12) == [0, 1, 2]
    assert (spread_out(101, 3), len(spread_out(1000, 12))) == ([0, 50, 100], 12)


@pytest.mark.parametrize(
    ("task", "name", "value", "page", "terminal"),
    [
        ("classification", "accuracy", 0.9111, "91.1 %", "91.1%"),
        ("regression", "rmse", 54.16234, "54.16", "54.16"),
        ("regression", "rmse", 12345.0, "12,340", "12,340"),
        ("causal-lm", "perplexity", math.inf, "∞", "inf"),
        ("regression", "r2", -0.25, "-0.2500", "-0.2500"),
        ("multilabel", "auroc", UNDEFINED, "undefined", "undefined"),
        ("multilabel", "auroc", None, "\u2013", "not evaluated"),
    ],
)
def test_values_are_in_the_unit_of_their_metric(task, name, value, page, terminal):
    assert in_unit(value, metric_named(name, task)) == page
    assert on_terminal(value, metric_named(name, task)) == terminal


def test_a_unit_of_your_own_is_behind_the_number():
    own = Metric(name="error", label="error", higher_is_better=False, unit="mg")
    assert (in_unit(2.5, own), in_unit(math.nan, own), on_terminal(2.5, own)) == ("2.500 mg", "\u2013", "2.500 mg")
