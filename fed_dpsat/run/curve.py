"""A curve as SVG for a notebook: no library, no file, and the colours of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 26, 34
LINE = "#4178be"
FEW = 40
"""Largest number of points that are marked one by one."""

Point = tuple[float, float]


def curve_svg(points: Sequence[Point], *, x: str, y: str) -> str:
    """``points`` of finite numbers, at least one, in order of x, as a line over axes with the names ``x`` and ``y``."""
    xs, ys = ticks([p[0] for p in points], whole=True), ticks([p[1] for p in points])
    left, right, bottom, top = xs[0], xs[-1], ys[0], ys[-1]

    def at(px: float, py: float) -> Point:
        across, up = (px - left) / (right - left), (py - bottom) / (top - bottom)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    placed = [at(*point) for point in points]
    alt = f"{y} against {x}: from {points[0][1]:.4g} to {points[-1][1]:.4g}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(alt)}" font-size="11" font-family="sans-serif" fill="currentColor">',
        *_grid([at(left, value)[1] for value in ys], ys),
        *(_text(at(value, bottom)[0], HEIGHT - BOTTOM + 15, f"{value:g}", "middle") for value in xs),
        _text(LEFT, TOP - 12, y, "start"),
        _text(WIDTH - RIGHT, HEIGHT - 5, x, "end"),
        f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in placed)}" fill="none" stroke="{LINE}" '
        'stroke-width="2" stroke-linejoin="round"/>',
        *(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{LINE}"/>' for a, b in placed if len(placed) <= FEW),
        "</svg>",
    ]
    return "".join(parts)


def ticks(values: Sequence[float], *, whole: bool = False) -> list[float]:
    """Two to seven multiples of 1, 2 or 5 times a power of ten around ``values``; integers if ``whole``."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= span)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * i:.9g}") for i in range(first, max(last, first + 1) + 1)]


def _grid(heights: Sequence[float], values: Sequence[float]) -> Iterator[str]:
    for height, value in zip(heights, values, strict=True):
        yield f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity="0.2"/>'
        yield _text(LEFT - 6, height + 4, f"{value:g}", "end")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
