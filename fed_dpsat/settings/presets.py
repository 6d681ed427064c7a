"""Settings that ship with the project, by name: a TOML file in the folder ``presets`` for each."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path

from fed_dpsat.errors import SettingError


def preset(name: str) -> Path:
    """The file of a preset; raises ``SettingError`` with near names for a name that none has."""
    files = _files()
    if name not in files:
        near = difflib.get_close_matches(name, files, n=3) or sorted(files)[:3]
        raise SettingError("--preset", name, "a preset", f"did you mean {', '.join(near)}? `fed-dpsat list presets`")
    return files[name]


def presets() -> dict[str, str]:
    """Name of each preset, and the first line of its file."""
    return {name: file.read_text().partition("\n")[0].lstrip("# ") for name, file in sorted(_files().items())}


def _files() -> dict[str, Path]:
    spec = find_spec("presets")
    folders = (spec.submodule_search_locations if spec else None) or ()
    return {file.stem: file for folder in folders for file in Path(folder).glob("*.toml")}
