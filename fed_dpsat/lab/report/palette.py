"""Colours of every figure and page, one per method.

They come from Okabe and Ito, "Color Universal Design" (2008), and are distinct for colour-blind readers. Each has a
version for a dark page. Series also differ in dash and marker, so that no figure needs its colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Colour:
    """``light`` is for a white page, ``dark`` for a black one; ``name`` is the CSS variable without its dashes."""

    name: str
    light: str
    dark: str


INK = Colour(name="ink", light="#1b1f24", dark="#e6edf3")
MUTED = Colour(name="muted", light="#57606a", dark="#9aa7b4")
GRID = Colour(name="grid", light="#d8dee4", dark="#2d3640")
PAPER = Colour(name="paper", light="#ffffff", dark="#11161c")

BLUE = Colour(name="blue", light="#0072b2", dark="#4db2ec")
VERMILLION = Colour(name="vermillion", light="#d55e00", dark="#ff8a4c")
GREEN = Colour(name="green", light="#009e73", dark="#2fcb9f")
PURPLE = Colour(name="purple", light="#cc79a7", dark="#e7a0c8")
ORANGE = Colour(name="orange", light="#e69f00", dark="#f5bd3d")
SKY = Colour(name="sky", light="#56b4e9", dark="#8fd3ff")
BLACK = Colour(name="black", light="#000000", dark="#ffffff")

SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
ALL = (INK, MUTED, GRID, PAPER, *SERIES)
DASHES: tuple[tuple[int, tuple[float, ...]], ...] = ((0, ()), (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

METHODS = {"dp-sat": BLUE, "dp-sgd": VERMILLION, "dp-sat-momentum": GREEN, "without privacy": BLACK}
"""A method has the same colour in all figures."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """The appearance of one series."""

    colour: Colour
    dash: tuple[int, tuple[float, ...]]
    marker: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look per name: the first name of a method has its colour; the others take free colours, then dashes."""
    own: dict[str, Colour] = {}
    for name in names:
        colour = METHODS.get(name.split(", ")[0])
        if colour is not None and colour not in own.values():
            own[name] = colour
    free = [colour for colour in SERIES if colour not in own.values()] or list(SERIES)
    found: dict[str, Look] = {}
    for i, name in enumerate(names):
        turn, at = divmod(len(found.keys() - own.keys()), len(free))
        colour, turn = (own[name], 0) if name in own else (free[at], turn)
        found[name] = Look(colour=colour, dash=DASHES[turn % len(DASHES)], marker=MARKERS[i % len(MARKERS)])
    return found


def css() -> str:
    """The colours as CSS variables, for a light and a dark page."""
    light, dark = (
        "".join(f"--{colour.name}:{getattr(colour, paper)};" for colour in ALL) for paper in ("light", "dark")
    )
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}"
