from math import inf, nan

import pytest

from fed_dpsat.lab.watch.sparkline import ASCII, BLOCKS, sparkline


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        ([], 8, ""),
        ([3.0, 3.0], 8, "▅▅"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, BLOCKS),
        ([7, 0], 8, "█▁"),
        ([0.0, nan, 1.0, inf], 8, "▁ █ "),
        ([nan], 8, " "),
        ([0, 2, 10, 12, 4, 6], 3, "▁█▄"),  # means of pairs: 1, 11, 5
        (range(1000), 8, BLOCKS),
    ],
)
def test_a_curve_in_a_line(values, width, text):
    assert sparkline(values, width) == text


def test_another_ramp():
    assert sparkline(range(8), 8, ASCII) == ASCII
