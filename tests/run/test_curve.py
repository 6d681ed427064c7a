"""The axes surround the values, and the SVG is whole: no library checks it before a browser does."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from fed_dpsat.run.curve import FEW, HEIGHT, WIDTH, curve_svg, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("values", "whole", "expected"),
    [
        ([3.1, 91.7], False, [0, 20, 40, 60, 80, 100]),
        ([0.31, 0.45], False, [0.3, 0.35, 0.4, 0.45]),
        ([0, 3], True, [0, 1, 2, 3]),
        ([0, 40], True, [0, 10, 20, 30, 40]),
        ([5.0, 5.0], False, [5, 6]),
        ([0.0], True, [0, 1]),
        ([-2.0, 3.0], False, [-2, -1, 0, 1, 2, 3]),
    ],
)
def test_ticks(values, whole, expected):
    assert ticks(values, whole=whole) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[1e-20, 3e-20], [2.5e7, 9.1e7], [-1.0, -1.0], [0.0, 1e-3]])
def test_ticks_surround_the_values_and_are_few(values):
    found = ticks(values)
    assert found[0] <= min(values) <= max(values) <= found[-1]
    assert 2 <= len(found) <= 7


def test_the_line_goes_through_the_points():
    root = ElementTree.fromstring(curve_svg([(0, 0.0), (1, 50.0), (2, 100.0)], x="round", y="a < b (%)"))
    points = [tuple(map(float, p.split(","))) for p in root.find(f"{SVG}polyline").get("points").split()]
    assert points[1] == pytest.approx([(a + b) / 2 for a, b in zip(points[0], points[2], strict=True)], abs=0.1)
    assert points[0][0] < points[2][0]
    assert points[0][1] > points[2][1]  # up is better, and SVG counts from the top
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in points)
    assert {"a < b (%)", "round", "0", "100"} <= {text.text for text in root.iter(f"{SVG}text")}
    assert len(root.findall(f"{SVG}circle")) == 3


def test_many_points_are_a_line_alone():
    root = ElementTree.fromstring(curve_svg([(i, float(i)) for i in range(FEW + 1)], x="round", y="loss"))
    assert root.findall(f"{SVG}circle") == []
