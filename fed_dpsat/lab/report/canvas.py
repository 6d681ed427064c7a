"""Matplotlib figures as inline SVG with the colours of the page, and as SVG and PNG files."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_dpsat.errors import InputError
from fed_dpsat.lab.report import palette
from fed_dpsat.lab.report.palette import GRID, INK, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.2, 2.9
"""Inches of one figure: the width of a phone; wide screens show two or three in a row."""

TITLE_WIDTH = 42
"""Characters of a line of a title that fit above the axes."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The numbers of a figure; ``note`` names omitted rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One figure of a page: ``name`` names its files, ``caption`` states the measurement and its data."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    table: Table | None = None
    private: bool = False


@contextmanager
def style() -> Iterator[None]:
    """Settings of matplotlib for the figures in the block."""
    mpl = matplotlib()
    settings = {
        "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9, "axes.spines.top": False,
        "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "fed_dpsat", "axes.edgecolor": MUTED.light,
        "axes.labelcolor": INK.light, "text.color": INK.light, "xtick.color": MUTED.light, "ytick.color": MUTED.light,
        "xtick.labelcolor": INK.light, "ytick.labelcolor": INK.light, "grid.color": GRID.light, "axes.grid": True,
        "axes.axisbelow": True, "grid.linewidth": 0.6, "lines.linewidth": 1.6, "lines.markersize": 3.5,
        "legend.frameon": False, "legend.fontsize": 8, "figure.facecolor": PAPER.light, "axes.facecolor": PAPER.light,
        "savefig.facecolor": PAPER.light,
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield


def matplotlib() -> Any:
    """The package; raises ``InputError`` if it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError("reports need matplotlib and Jinja2; pip install 'fed-dpsat[figures]'") from None
    return mpl


def blank(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def draw(
    name: str,
    paint: Callable[[Axes], None],
    *,
    title: str,
    caption: str,
    alt: str,
    folder: Path,
    table: Table | None = None,
    private: bool = False,
    height: float = HEIGHT,
    subtitle: str = "",
) -> Drawing:
    """Call ``paint`` on empty axes below ``title`` and ``subtitle``, and write it to ``folder`` as SVG and PNG."""
    with style():
        figure, axes = blank(height=height)
        paint(axes)
        axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=8)
        words, pad = textwrap.fill(title, TITLE_WIDTH), 16 if subtitle else 6
        axes.set_title(words, loc="left", color=INK.light, fontweight="bold", pad=pad)
        svg = save(figure, folder / name)
    return Drawing(
        name=name,
        title=title,
        caption=caption,
        alt=alt,
        svg=inline(svg, name, title, alt),
        table=table,
        private=private,
    )


def save(figure: Figure, path: Path) -> str:
    """Write the figure to ``path`` with the suffixes .svg and .png; returns the text of the SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    figure.set_layout_engine("none")  # keep the layout of the SVG
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    path.with_suffix(".svg").write_text(buffer.getvalue())
    return buffer.getvalue()


def inline(svg: str, name: str, title: str, alt: str) -> str:
    """``svg`` for an HTML page: no metadata, unique ids, and CSS variables as colours."""
    from markupsafe import escape

    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    opening, body = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None  # matplotlib writes one
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    for colour in palette.ALL:
        body = body.replace(colour.light, f"var(--{colour.name})")
    body = re.sub(r"font: ([\d.]+px|bold [\d.]+px|700 [\d.]+px) [^;\"]*", r"font: \1 var(--font)", body)
    head = f'<svg role="img" aria-labelledby="{name}-t {name}-d" {box.group()} preserveAspectRatio="xMidYMid meet">'
    words = f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(alt)}</desc>'
    return head + words + body


def thinned(head: Sequence[str], rows: Sequence[Sequence[str]], whole: str, most: int = 12) -> Table:
    """A table of at most ``most`` evenly spaced rows; ``whole`` names the file with all rows."""
    from fed_dpsat.run.numbers import spread_out

    kept = spread_out(len(rows), most)
    note = "" if len(kept) == len(rows) else f"{len(kept)} of {len(rows)} rows; all are in {whole}."
    return Table(head=tuple(head), rows=tuple(tuple(rows[i]) for i in kept), note=note)
