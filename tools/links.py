"""The links of a page to files and headings of this project; links to other sites are not checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

LINK = re.compile(r"\]\(([^()\s]+)(?: \"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6} +(.*?)\s*$", re.MULTILINE)
FENCED = re.compile(r"^( *)```.*?^\1```\s*$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`((?:fed_dpsat|strategies|simulations|docs|tests|benchmarks|tools)/[\w/]+\.\w+)`")


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCED.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a page, as Python-Markdown and (if they agree) GitHub make them."""
    return {slug(heading) for heading in HEADING.findall(prose(text))}


def slug(heading: str) -> str:
    """``## What is charged`` is ``what-is-charged``."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def broken(path: Path, root: Path) -> Iterator[str]:
    """The missing targets of a page: a file, a heading, or a file of ``root`` named in code."""
    text = path.read_text()
    for target in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        if not found.exists():
            yield f"{path.name}: {target}: no file {file}"
        elif anchor and found.suffix == ".md" and anchor not in anchors(found.read_text()):
            yield f"{path.name}: {target}: {found.name} has no heading {anchor}"
    for name in NAMED.findall(text):
        if not (root / name).exists():
            yield f"{path.name}: `{name}` does not exist"
