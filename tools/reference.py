"""``python -m tools.reference``: write docs/reference/*.md from the code, and the navigation in mkdocs.yml.

A test fails if the files differ from the output of this module.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_type_hints

import typer

import fed_dpsat
import fed_dpsat.testing
from fed_dpsat import plugins
from fed_dpsat.cli import app
from fed_dpsat.lab.settings_view import title
from fed_dpsat.settings.combinations import GROUPS
from fed_dpsat.settings.config import MACHINE

ROOT = Path(__file__).parents[1]
BEGIN, END = "# nav: begin", "# nav: end"
SECTIONS = (
    ("", ("index.md", "quickstart.md", "notebook.md", "concepts.md", "coming_from.md")),
    (
        "Guides",
        (
            "partitions.md",
            "recipes.md",
            "data.md",
            "features.md",
            "statistics.md",
            "models.md",
            "tasks.md",
            "optimizers.md",
            "strategies.md",
            "correlated_noise.md",
            "sweeps.md",
            "reports.md",
            "scale.md",
            "deploy.md",
            "operate.md",
        ),
    ),
    ("Privacy", ("privacy.md", "audit.md")),
    ("Results", ("gallery.md", "sharpness.md", "sources.md", "results/*.md")),
    ("Reference", ("architecture.md", "reference/*.md")),
    ("More", ("*.md",)),
)
"""A page goes into the first section with a matching pattern; the last pattern matches every page."""

EXTENSION_POINTS = (
    "fed_dpsat.step.optimizers.base:PrivateOptimizer",
    "fed_dpsat.step.clipping:ClippingRule",
    "fed_dpsat.data.dataset:Examples",
    "fed_dpsat.data.dataset:Dataset",
    "fed_dpsat.data.sequences:Sequences",
    "fed_dpsat.tasks.base:Task",
    "fed_dpsat.tasks.metric:Metric",
    "fed_dpsat.flower.updates:UpdateStrategy",
    "fed_dpsat.flower.updates:Updates",
    "fed_dpsat.lab.attacks:Attack",
    "fed_dpsat.lab.loggers:RunLogger",
)


FEW = 20
"""Largest number of parameters in a signature; a class with more has a page of its own."""

COMPLETION = (
    "`fed-dpsat --version` prints the version, `python -m fed_dpsat` is the same program, and `fed-dpsat "
    "--install-completion` lets the Tab key of your shell complete commands, options and names of settings."
)
EXIT_CODES = (("0", "done"), ("1", "a run that failed"), ("2", "bad input"), ("130", "Ctrl-C"))


def pages() -> dict[str, str]:
    """Path to text of every generated page."""
    return {
        "docs/reference/cli.md": cli_page(),
        "docs/reference/configuration.md": configuration_page(),
        "docs/reference/plugins.md": plugins_page(),
        "docs/reference/python.md": python_page(),
    }


def cli_page() -> str:
    """Every command with its arguments and options."""
    root: Any = typer.main.get_command(app)
    lines = [*_title("Command line", f"{root.help} {COMPLETION}")]
    for path, command in _commands(root, ("fed-dpsat",)):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = [*path, *(["[OPTIONS]"] if options else []), *(p.human_readable_name for p in arguments)]
        help_text = inspect.cleandoc(command.help or "").strip()
        lines += [f"## {' '.join(path)}", "", _prose(help_text), "", "```text", " ".join(usage), "```", ""]
        if path[1:] == ("run",):
            lines += ["The settings that `--set` takes are in [Configuration](configuration.md).", ""]
        rows = [(f"`{p.human_readable_name}`", _help(command, p)) for p in arguments]
        rows += [(", ".join(f"`{name}`" for name in p.opts) + _value(p), _help(command, p)) for p in options]
        lines += _table(("argument or option", "what it does"), rows) if rows else []
    return "\n".join([*lines, "## Exit codes", "", *_table(("code", "meaning"), EXIT_CODES)])


def configuration_page() -> str:
    """Every setting, group by group."""
    intro = (
        'Every setting is one key in a TOML file, `--set key=value`, or `flwr run -c "key=value"`. '
        "Relative paths in a file are relative to it. Settings marked **↻** may change when a run resumes: they do not "
        "change its result. A larger `num_rounds` extends a run."
    )
    lines = [*_title("Configuration", intro)]
    head = ("setting", "what it is", "type", "default", "values")
    for group in GROUPS:
        rows = []
        for spec in dataclasses.fields(group):
            shown = f"`{spec.name}`{' **↻**' if spec.name in MACHINE else ''}"
            rows.append((shown, spec.metadata["doc"], str(spec.type), _default(spec.default), _bounds(spec)))
        lines += [f"## {title(group)}", "", *_table(head, rows)]
    return "\n".join(lines)


def plugins_page() -> str:
    """The output of ``fed-dpsat list``."""
    intro = (
        "The plug-ins of the project, as `fed-dpsat list` prints them. The name of your own plug-in is "
        "`package.module:attribute` or `path/to/file.py:attribute`: see [Recipes](../recipes.md)."
    )
    lines = [*_title("Built-in plug-ins", intro)]
    for kind in plugins.PACKAGES:
        rows = [(f"`{name}`", line) for name, line in plugins.listed(kind).items()]
        lines += [f"## {kind}", "", *_table(("name", "what it is"), rows)]
    return "\n".join(lines)


def python_page() -> str:
    """Signatures and docstrings of the exports, the test suites and the classes that a plug-in implements."""
    lines = [*_title("Python", "The exports of `import fed_dpsat`; other names may change without notice.")]
    for name in fed_dpsat.__all__:
        lines += _object(f"fed_dpsat.{name}", getattr(fed_dpsat, name))
    lines += ["## Classes and protocols of plug-ins", ""]
    for target in EXTENSION_POINTS:
        module, _, name = target.partition(":")
        lines += _object(f"{module}.{name}", getattr(importlib.import_module(module), name), level=3)
    lines += ["## fed_dpsat.testing", "", *_docstring(fed_dpsat.testing)]
    for name in fed_dpsat.testing.__all__:
        lines += _object(f"fed_dpsat.testing.{name}", getattr(fed_dpsat.testing, name), level=3)
    return "\n".join(lines)


def navigation(docs: Path) -> str:
    """The ``nav`` of mkdocs.yml: every page under ``docs``, in the order of ``SECTIONS``."""
    left = {str(path.relative_to(docs)) for path in docs.rglob("*.md")} | {n.removeprefix("docs/") for n in pages()}
    lines = [f"{BEGIN} (written by python -m tools.reference)", "nav:"]
    for section, patterns in SECTIONS:
        found = [name for pattern in patterns for name in sorted(left) if fnmatch(name, pattern)]
        left -= set(found)
        indent = "  " if not section else "      "
        lines += [f"  - {section}:"] if section and found else []
        lines += [f"{indent}- {name}" for name in found]
    return "\n".join([*lines, END])


def with_navigation(text: str, docs: Path) -> str:
    """The text of mkdocs.yml with a new navigation."""
    before, _, rest = text.partition(BEGIN)
    return before + navigation(docs) + rest.partition(END)[2]


def main() -> None:
    """Write all pages and the navigation."""
    (ROOT / "docs" / "reference").mkdir(exist_ok=True)
    for name, text in pages().items():
        (ROOT / name).write_text(text)
    config = ROOT / "mkdocs.yml"
    config.write_text(with_navigation(config.read_text(), ROOT / "docs"))


def _title(title: str, intro: str) -> list[str]:
    return [f"# {title}", "", "<!-- Written by python -m tools.reference; do not edit. -->", "", intro, ""]


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, sub in command.commands.items():
        if hasattr(sub, "commands"):
            yield from _commands(sub, (*path, name))
        else:
            yield (*path, name), sub


def _plain(text: str) -> str:
    """``<function f at 0x7f>`` is f."""
    return re.sub(r"<(?:function|class) '?([\w.]+)'?(?: at 0x\w+)?>", r"\1", text)


def _help(command: Any, parameter: Any) -> str:
    """The help text in the annotation; some versions of typer and click lose the help of an argument."""
    hints = get_type_hints(command.callback, include_extras=True)
    return str(hints[parameter.name].__metadata__[0].help)


def _value(option: Any) -> str:
    if option.is_flag:
        return ""
    default = "" if option.default is None else f" (default `{option.default}`)"
    return f" `{option.metavar or option.type.name.upper()}`{default}"


def _default(value: object) -> str:
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value!r}`".replace("'", '"')


def _bounds(spec: dataclasses.Field[Any]) -> str:
    limits = spec.metadata
    if limits["choices"]:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    parts = [f"> {limits['above']:g}"] if limits["above"] > -math.inf else []
    parts += [f">= {limits['least']:g}"] if limits["least"] > -math.inf else []
    parts += [f"<= {limits['most']:g}"] if limits["most"] < math.inf else []
    return ", ".join(parts)


def _object(name: str, value: Any, level: int = 2) -> list[str]:
    title = f"{'#' * level} {name.rpartition('.')[2]}"
    lines = [title, "", "```text", _signature(name, value), "```", "", *_docstring(value)]
    for member, function in _methods(value) if inspect.isclass(value) else ():
        shown = member if isinstance(function, property) else _signature(member, function)
        lines += ["```text", shown, "```", "", *_docstring(function)]
    return lines


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties with a docstring, in the order of the source.

    Also those of bases in the same module that have no entry of their own and, of settings, of the groups.
    """
    owners = [
        base
        for base in reversed(cls.__mro__)
        if base is cls
        or (base.__module__ == cls.__module__ and base.__name__ not in fed_dpsat.__all__)
        or base.__module__.startswith("fed_dpsat.settings.")
    ]
    for member, value in [item for owner in owners for item in vars(owner).items()]:
        function = getattr(value, "__func__", value)
        public = not member.startswith("_") and member not in getattr(cls, "__annotations__", {})
        if public and (inspect.isfunction(function) or isinstance(function, property)) and inspect.getdoc(function):
            yield member, function


def _signature(name: str, value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except ValueError:
        return name
    shown = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    parameters = [re.sub(r": '([^']*)'", r": \1", _plain(str(p))) for p in shown]
    if getattr(value, "_is_protocol", False):
        return f"{name} (protocol)"
    kinds = [p.kind for p in shown]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returns = signature.return_annotation
    known = returns is not signature.empty and not inspect.isclass(value)
    arrow = f" -> {returns if isinstance(returns, str) else returns.__name__}" if known else ""
    if len(parameters) > FEW:
        return f"{name}(**settings)"
    line = f"{name}({', '.join(parameters)}){arrow}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){arrow}"


def _docstring(value: Any) -> list[str]:
    return [_prose(inspect.getdoc(value) or ""), ""]


def _prose(text: str) -> str:
    """A docstring as Markdown; tables of ``====`` become text blocks."""
    lines, out, inside = text.splitlines(), [], False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        rule = bool(re.fullmatch(r" *=+( +=+)+ *", line))
        if rule and not inside:
            out.append("```text")
            inside = True
        out.append(line if inside else re.sub(r"::$", ":", line.replace("``", "`")))
        if rule and not following.strip():
            out.append("```")
            inside = False
    return "\n".join(out)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in escaped),
        "",
    ]


if __name__ == "__main__":
    main()
