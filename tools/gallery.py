"""docs/gallery.md and its figures, from runs committed as JSON lines: ``python -m tools.gallery``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fed_dpsat.errors import InputError
from fed_dpsat.lab.report import canvas
from fed_dpsat.lab.report.canvas import Drawing, Table
from fed_dpsat.lab.report.comparing import Comparison, compare
from fed_dpsat.lab.report.comparing_figures import drawings
from fed_dpsat.lab.report.comparing_page import as_table
from fed_dpsat.lab.report.condensed import read_runs
from fed_dpsat.settings.config import RunConfig

HEAD = """# Gallery

`python -m tools.gallery` makes this page from the runs in `docs/runs`, which `python -m simulations.gallery` makes.
`fed-dpsat compare docs/runs/NAME.jsonl` prints the tables; with `--out compare.html` it writes a page. Accuracy, loss
and ECE are means over seeds with 95 % intervals (Student's t), on public test data, after the last round; sd is the
standard deviation of single runs; front: no other group has as little epsilon and as much accuracy. Epsilon is the
maximum over clients, for one example of one client, against a server that sees every update. The noise is seeded:
reproducible, and so not private. Intervals are not corrected for the number of groups.
"""

ALWAYS = ("dataset", "num_clients", "model", "num_rounds", "sample_rate", "clip_norm")
"""Settings that the text always names, also at their defaults."""


def write_gallery(runs: Path, out: Path) -> Path:
    """Write ``gallery.md`` into ``out`` and SVG figures into ``gallery/``, a part for each ``.jsonl`` file of ``runs``.

    Raises ``InputError`` without such a file.
    """
    canvas.matplotlib()
    files = sorted(runs.glob("*.jsonl"))
    if not files:
        raise InputError(f"{runs} has no .jsonl file of runs; `fed-dpsat compare RUN... --out x.jsonl` writes one")
    parts = [HEAD]
    for file in files:
        found = compare(read_runs([file]))
        made = list(drawings(found, out / "gallery", prefix=f"{file.stem}-"))
        parts.append(_part(file.stem, found, made))
    for picture in (out / "gallery").glob("*.png"):
        picture.unlink()  # the page uses only the SVG
    (out / "gallery.md").write_text("\n".join(parts))
    return out / "gallery.md"


def _part(name: str, found: Comparison, made: Sequence[Drawing]) -> str:
    default = {**RunConfig(noise_multiplier=1.0).settings(), "noise_multiplier": 0.0}
    shared = [f"`{k}` {v}" for k, v in found.common.items() if k in ALWAYS or v != str(default.get(k, v))]
    differing = ", ".join(f"`{setting}`" for setting in found.differing)
    return "\n".join(
        [
            f"## {name.replace('-', ' ').capitalize()}",
            "",
            f"{sum(len(group.runs) for group in found.groups)} runs in {len(found.groups)} groups that differ in "
            f"{differing}; seeds {_seeds(found)}. All share {', '.join(shared) or 'the defaults'}.",
            "",
            *_markdown(as_table(found)),
            "",
            *(f"{note}\n" for note in found.notes),
            *(f"![{drawing.title}](gallery/{drawing.name}.svg)\n\n{drawing.caption}\n" for drawing in made),
        ]
    )


def _seeds(found: Comparison) -> str:
    return ", ".join(str(seed) for seed in sorted({seed for group in found.groups for seed in group.seeds}))


def _markdown(table: Table) -> list[str]:
    lines = [table.head, ("---",) * len(table.head), *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("docs/runs"), help="folder of .jsonl files")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of gallery.md and gallery/")
    chosen = parser.parse_args()
    print(write_gallery(chosen.runs, chosen.out))


if __name__ == "__main__":
    main()
