"""The user's Python files that a plug-in runs: its own file and, recursively, the files that it imports.

A file of the user is one that neither Python, an installed package nor this project ships. This module reads imports
from the source, also inside functions, and from the attributes of a loaded module, which include dynamic imports. It
imports nothing. It does not find files that a plug-in opens itself.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from fed_dpsat.models.libraries import LIBRARIES, files_of

HERE = Path(__file__).resolve().parents[1]
SHIPPED = (
    HERE,
    HERE.parent / "strategies",
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
INSTALLED = frozenset({"site-packages", "dist-packages"})


def plugin_sources(name: str) -> dict[str, Path]:
    """Files of the plug-in ``name`` by their relative paths, such as ``helpers/tools.py``; empty for a built-in one.

    The file of ``name`` itself is always included, except a file of this project. For a network of a library it is the
    file that describes it.
    """
    if (library := name.partition(":")[0]) in LIBRARIES and library != name:
        return files_of(name)
    target, separator, _ = name.rpartition(":")
    if not separator:
        return {}
    first = [Path(target)] if target.endswith(".py") else [file for n in _parents(target) if (file := _file_of(n))]
    first = [file.resolve() for file in first]
    if not first or any(first[-1].is_relative_to(folder) for folder in SHIPPED[:2]):
        return {}
    found: dict[Path, None] = {first[-1]: None}
    waiting = [file for file in first if _is_own(file)]
    while waiting:
        file = waiting.pop()
        found[file] = None
        if file.suffix == ".py":
            imported = {other.resolve() for other in _imported(file)}
            waiting += [other for other in sorted(imported) if other not in found and _is_own(other)]
    return {_called(file): file for file in found}


def _imported(file: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError):
        return  # Python cannot import it either
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files_of(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for name in (node.module or "", *(".".join(filter(None, (node.module, a.name))) for a in node.names)):
                yield from _relative(file, node.level, name) if node.level else _files_of(name)
    held = vars(module).values() if (module := _loaded(file)) else ()
    holders = {v.__name__ if isinstance(v, ModuleType) else getattr(v, "__module__", None) for v in held}
    for holder in holders:
        yield from _files_of(holder)


def _files_of(name: object) -> Iterator[Path]:
    if isinstance(name, str) and name:
        yield from (file for parent in _parents(name) if (file := _file_of(parent)))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _file_of(name: str) -> Path | None:
    """The file of the module ``name``, imported or not."""
    if (module := sys.modules.get(name)) is not None:
        return _path(module)
    path = None
    for parent in _parents(name):
        spec = PathFinder.find_spec(parent, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def _relative(file: Path, level: int, name: str) -> Iterator[Path]:
    base = file.parents[level - 1]
    for parent in _parents(name) if name else ():
        at = base.joinpath(*parent.split("."))
        yield from (f for f in (at.with_name(at.name + ".py"), at / "__init__.py") if f.is_file())


def _loaded(file: Path) -> ModuleType | None:
    return next(
        (m for m in list(sys.modules.values()) if (path := _path(m, file.name)) and path.resolve() == file), None
    )


def _path(module: object, name: str = "") -> Path | None:
    """The file of ``module`` if its path ends in ``name``."""
    where = vars(module).get("__file__") if isinstance(module, ModuleType) else None
    return Path(where) if isinstance(where, str) and where.endswith(name) else None


def _is_own(file: Path) -> bool:
    return not (INSTALLED & set(file.parts) or any(file.is_relative_to(folder) for folder in SHIPPED))


def _called(file: Path) -> str:
    """``file`` relative to the folder of its outermost package."""
    root = file.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    return file.relative_to(root).as_posix()
