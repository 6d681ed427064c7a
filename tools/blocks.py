"""Run the code blocks of a page: a page is one session in one folder, from top to bottom.

=================== ======================================================================================
block               execution
=================== ======================================================================================
python              in this process, with its own names
python, a file      the first line ``# name.py`` writes a file; tests of a ``test_*.py`` run
bash                ``fed-dpsat ...`` in this process, other commands by bash; the repository is linked
toml                parsed; the first line ``# name.toml`` writes a file
another language    none; another name of shell or Python is an error
=================== ======================================================================================

A block that cannot run in a test states the reason in its first line: ``# Not run in tests: REASON``. The verbs,
options and settings of its ``fed-dpsat`` commands are still checked. The slow tests run a page with the line
``<!-- blocks: slow -->``. A page with ``<!-- blocks: need timm peft -->`` is skipped if one of these packages is not
installed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOT_RUN = "# Not run in tests:"
SLOW = "<!-- blocks: slow -->"
NEED = re.compile(r"<!-- blocks: need (.*) -->")
LANGUAGES = ("python", "bash", "toml")
OTHER_NAMES = {"py": "python", "python3": "python", "pycon": "python", "sh": "bash", "shell": "bash", "console": "bash"}
AT_HAND = ("fed_dpsat", "simulations", "strategies", "benchmarks", "pyproject.toml")

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)$")
FILE = re.compile(r"# ([\w/]+\.(?:py|toml|csv))\b")


def missing(page: Path) -> list[str]:
    """Packages that the blocks of ``page`` need and that are not installed."""
    found = NEED.search(page.read_text())
    return [name for name in found[1].split() if find_spec(name) is None] if found else []


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block; ``line`` is the line of its fence, from 1."""

    page: str
    line: int
    language: str
    text: str

    @property
    def first_line(self) -> str:
        """The first line of its text."""
        return self.text.partition("\n")[0]

    @property
    def not_run(self) -> str | None:
        """The reason why it does not run; None if it runs."""
        return self.first_line.removeprefix(NOT_RUN).strip() if self.first_line.startswith(NOT_RUN) else None

    @property
    def file(self) -> str | None:
        """The name of its file, if it writes one."""
        named = FILE.match(self.first_line) if self.language in ("python", "toml") else None
        return named[1] if named else None

    def commands(self) -> Iterator[str]:
        """The commands of a shell block, with continued lines and multi-line quotes joined, without comments."""
        pending = ""
        for line in self.text.splitlines():
            if not pending and (not line.strip() or line.lstrip().startswith("#")):
                continue
            pending = f"{pending}\n{line}" if pending else line
            if not line.endswith("\\") and _closed(pending):
                yield pending
                pending = ""
        if pending:
            raise ValueError(f"{self}: a command has no end: {pending}")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a page; raises ``ValueError`` for a fence that is not closed."""
    found: list[Block] = []
    opened: tuple[int, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, lines = (number, fence["info"].split(" ")[0].strip(), len(fence["indent"])), []
        elif opened and fence and not fence["info"].strip():
            at, language, _ = opened
            page = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
            found.append(Block(page=page, line=at, language=language, text="\n".join(lines) + "\n"))
            opened = None
        elif opened:
            lines.append(line[opened[2] :])
    if opened:
        raise ValueError(f"{path}:{opened[0]}: the block is not closed")
    return found


def problem(block: Block) -> str | None:
    """The mistake in the marks of a block; None without a mistake."""
    if block.language in OTHER_NAMES:
        return f"{block}: write {OTHER_NAMES[block.language]} and not {block.language}, so that it runs"
    if not block.language:
        return f"{block}: name a language, or text"
    if block.not_run is not None and len(block.not_run) < 10:
        return f"{block}: state the reason after {NOT_RUN!r}"
    return None


def run_block(block: Block, folder: Path) -> None:
    """Run a block in the current folder ``folder``; raises its errors, and ``AssertionError`` for a command."""
    if block.not_run is not None or block.language not in LANGUAGES:
        return
    if block.language == "toml":
        tomllib.loads(block.text)
    if block.file:
        (folder / block.file).write_text(block.text)
    if block.language == "python" and not (block.file and not Path(block.file).name.startswith("test_")):
        names: dict[str, Any] = {"__name__": "page"}
        exec(compile("\n" * block.line + block.text, block.page, "exec"), names)
        for name in [name for name in names if name.startswith("test_") and block.file]:
            names[name]()
    elif block.language == "bash":
        for is_ours, commands in groupby(block.commands(), _is_ours):
            for command in commands if is_ours else ["\n".join(commands)]:
                run_command(command, block)


def run_command(command: str, block: Block) -> None:
    """Run a call of fed-dpsat in this process, which saves seconds of imports, or a script in bash."""
    if _is_ours(command):
        from typer.testing import CliRunner

        from fed_dpsat.cli import app

        result = CliRunner().invoke(app, shlex.split(command.replace("\\\n", " "), comments=True)[1:])
        assert result.exit_code == 0, f"{block}: {command}: exit code {result.exit_code}: {result.output}"
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    here = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    script = f'fed-dpsat() {{ "{sys.executable}" -m fed_dpsat.cli "$@"; }}\nset -euo pipefail\n{command}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=here, check=False)
    assert done.returncode == 0, f"{block}: {command}: exit code {done.returncode}: {done.stdout}{done.stderr}"


def _is_ours(command: str) -> bool:
    """Whether ``command`` is a call of fed-dpsat without features of the shell."""
    return command.startswith("fed-dpsat ") and not re.search(r"[|<>;&$`]", command)


def _closed(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def check_command(command: str, folder: Path) -> None:
    """Raise for a ``fed-dpsat`` command with an unknown verb, option or setting; other commands pass."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    if not words or words[0] != "fed-dpsat":
        return
    import typer
    from click.exceptions import Exit

    from fed_dpsat.cli import app
    from fed_dpsat.settings.config import RunConfig
    from fed_dpsat.settings.flat import parse_overrides

    verb: Any = typer.main.get_command(app)
    name, rest, context = "fed-dpsat", words[1:], None
    try:
        while True:
            arguments = list(rest)
            context = verb.make_context(name, rest, parent=context)
            if not hasattr(verb, "commands"):
                break
            name, verb, rest = verb.resolve_command(context, arguments)
    except Exit:
        return  # --help
    known = RunConfig.__dataclass_fields__
    for key in parse_overrides(context.params.get("overrides") or ()):
        assert key in known, f"{command}: {key} is not a setting"
    config = context.params.get("config")
    assert config is None or (folder / config).is_file(), f"{command}: no {config}"


def prepare(folder: Path) -> None:
    """Link the folders of the repository into ``folder``."""
    for name in AT_HAND:
        (folder / name).symlink_to(ROOT / name)
