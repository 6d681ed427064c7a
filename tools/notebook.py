"""``python -m tools.notebook``: run the Python blocks of docs/notebook.md as cells, and write their outputs below them.

The cells share their names and one folder. An output is what a cell prints, and its last expression as a notebook
shows it: as HTML if it is an object of this project, else as text. A test fails if the outputs in the page have another
form than those of the code; their numbers may differ between machines.
"""

from __future__ import annotations

import ast
import io
import re
import tempfile
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "notebook.md"
CELL = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n<!-- output -->\n.*?<!-- end of output -->\n)?", re.DOTALL)


def executed(text: str) -> str:
    """The page ``text`` with the outputs of its cells, run from top to bottom in the current folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return CELL.sub(lambda cell: f"```python\n{cell['code']}```\n{_output(cell['code'], names)}", text)


def form(text: str) -> str:
    """``text`` with a # for each number, or list of numbers."""
    return re.sub(r"-?\d[\d.,e+-]*( +-?\d[\d.,e+-]*)*", "#", text)


def main() -> None:
    """Write the page."""
    text = PAGE.read_text()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        text = executed(text)
    PAGE.write_text(text)


def _output(code: str, names: dict[str, Any]) -> str:
    tree, printed, value = ast.parse(code), io.StringIO(), None
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(printed):
        exec(compile(tree, str(PAGE), "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), str(PAGE), "eval"), names)
    parts = [_text(printed.getvalue()) if printed.getvalue() else "", "" if value is None else _shown(value)]
    shown = "\n".join(filter(None, parts))
    return f"\n<!-- output -->\n{shown}\n<!-- end of output -->\n" if shown else ""


def _shown(value: Any) -> str:
    if type(value).__module__.startswith("fed_dpsat"):
        return f'<div class="output">{value._repr_html_()}</div>'
    return _text(repr(value))


def _text(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


if __name__ == "__main__":
    main()
