"""Paths in the values of settings: a setting declares where its value has one (``setting(..., path=of_file)``).

A relative path in a TOML file is relative to that file, and one on the command line or in Python to the working
directory. ``beside`` makes all of them absolute.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

Place = Callable[[str], str]
"""From a path to another one."""
Placed = Callable[[str, Place], str]
"""From a value of a setting to the value with each path in it replaced."""

FOLDERS = ("transformers",)
"""Prefixes of networks of a library that a folder describes."""
IN_QUOTES = re.compile(r"""(?<=['"])[^'"]+\.py:\w+(?=['"])""")


def of_file(value: str, place: Place) -> str:
    """``value`` is a file or a folder, or empty."""
    return place(value) if value else value


def of_file_unless(word: str) -> Placed:
    """The value is a file or a folder, except ``word``."""
    return lambda value, place: value if value == word else of_file(value, place)


def of_plugin(value: str, place: Place) -> str:
    """``value`` is a name, and a file if it has the form ``file.py:attribute`` or ``transformers:FOLDER``."""
    prefix, separator, name = value.partition(":")
    if separator and prefix in FOLDERS:
        return f"{prefix}:{of_file(name, place)}"
    target, _, attribute = value.rpartition(":")
    return f"{place(target)}:{attribute}" if target.endswith(".py") else value


def of_plugins(separator: str) -> Placed:
    """The value is several names with ``separator`` between them."""
    return lambda value, place: separator.join(of_plugin(name.strip(), place) for name in value.split(separator))


def of_arguments(value: str, place: Place) -> str:
    """``value`` is arguments, of which texts of the form ``file.py:attribute`` are files."""
    return IN_QUOTES.sub(lambda found: of_plugin(found[0], place), value)


def in_folder(folder: Path) -> Place:
    """Makes a path absolute; a relative one starts at ``folder``."""
    return lambda path: os.path.abspath(folder / os.path.expanduser(path))


def beside(values: Mapping[str, Any], folder: Path, specs: Iterable[Field[Any]]) -> dict[str, Any]:
    """``values`` of settings, by their names in ``specs``, with all paths absolute; relative ones start at ``folder``.

    A value of another type than text stays as it is: the check of the setting refuses it.
    """
    return _replaced(values, in_folder(folder), specs)


def without_folders(values: Mapping[str, Any], specs: Iterable[Field[Any]]) -> dict[str, Any]:
    """``values`` of settings with the last part of each path alone."""
    return _replaced(values, os.path.basename, specs)


def _replaced(values: Mapping[str, Any], place: Place, specs: Iterable[Field[Any]]) -> dict[str, Any]:
    placed: dict[str, Placed] = {spec.name: spec.metadata["path"] for spec in specs if spec.metadata["path"]}
    return {
        name: placed[name](value, place) if name in placed and isinstance(value, str) else value
        for name, value in values.items()
    }
