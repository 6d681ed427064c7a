"""Small working projects, each with its test: ``fed-dpsat init FOLDER --kind KIND`` writes one.

A project is the folder of its kind beside this file; ``NAME.tmpl`` in it is the content of the file ``NAME``.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fed_dpsat.errors import SettingError, written

KINDS = {
    "simulation": "a configuration and its network",
    "strategy": "a server strategy and a configuration that runs it",
    "optimizer": "a private optimizer and a configuration that runs it",
    "device": "the policy and the data of a device",
}
SUFFIX = ".tmpl"


def start(folder: Path, kind: str) -> list[str]:
    """Write the project of ``kind`` into ``folder``; the names of its files.

    Raises ``SettingError`` for an unknown kind and for a folder that is not new or empty.
    """
    if kind not in KINDS:
        raise SettingError("--kind", kind, f"one of {', '.join(KINDS)}", "simulation is the default")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError("FOLDER", str(folder), "new or empty", "name another one; nothing was written")
    names = []
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for template in sorted(files(__package__).joinpath(kind).iterdir(), key=lambda one: one.name):
            names.append(template.name.removesuffix(SUFFIX))
            (folder / names[-1]).write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    return names
