"""Decoded arrays on disk, memory-mapped so that all processes of a machine share one copy.

A cache is a folder ``cache_dir/<name>-<fingerprint>/`` of ``.npy`` files and a ``meta.json``. The fingerprint
is of all that decides what is decoded: paths, sizes and times of the source files, the columns, shape and classes that
are asked for, and the version of Pillow. A folder is written under another name and renamed when it is whole; whoever
is second in a race drops its own copy. One whose files have not the sizes in ``meta.json`` is built anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.data.dataset import DataError

FORMAT = 1  # part of the fingerprint: raise it when the arrays' layout changes
Arrays = Mapping[str, np.ndarray]


def fingerprint(decoding: Mapping[str, object], files: Sequence[Path]) -> str:
    """16 hex digits that change with ``decoding`` (of JSON's types) and with any file's absolute path, size or time.

    Both times count: archives and copies set that of modification, for files that are as long and another's.
    """
    stats = [(str(file.absolute()), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file in files for s in [file.stat()]]
    decided = [FORMAT, version("pillow"), dict(decoding), stats]
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def cached(folder: Path, decode: Callable[[], Arrays]) -> dict[str, Tensor]:
    """The arrays of ``decode``, memory-mapped from ``folder``, which is written first if it is not there.

    Raises ``DataError`` if ``folder`` cannot be written, and whatever ``decode`` raises, leaving no folder.
    """
    arrays = _open(folder)
    if arrays is None:
        decoded = decode()
        try:
            _store(folder, decoded)
        except OSError as error:
            raise DataError(
                f"cache_dir={str(folder.parent)!r} cannot be written ({error}); --set cache_dir=DIR with another folder"
            ) from error
        arrays = _open(folder)
    if arrays is None:
        raise DataError(f"{folder} changed while it was being written; delete it and start again")
    return arrays


def _open(folder: Path) -> dict[str, Tensor] | None:
    """The arrays of a whole cache, None where there is none."""
    try:
        sizes: dict[str, int] = json.loads((folder / "meta.json").read_text())["sizes"]
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        # Copy-on-write rather than read-only: torch warns of arrays that it could not write to. Pages are
        # shared all the same for as long as nobody writes, and a write never reaches the file.
        return {Path(name).stem: torch.from_numpy(np.load(folder / name, mmap_mode="c")) for name in sizes}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):  # no JSON of ours, no .npy
        return None


def _store(folder: Path, arrays: Arrays) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        sizes = {}
        for name, array in arrays.items():
            file = whole / f"{name}.npy"
            np.save(file, np.ascontiguousarray(array))
            sizes[file.name] = file.stat().st_size
        (whole / "meta.json").write_text(json.dumps({"sizes": sizes}))
        if _open(folder) is None:
            with contextlib.suppress(FileNotFoundError):  # usually there is nothing to move out of the way
                folder.rename(Path(temporary) / "broken")
        try:
            whole.rename(folder)
        except OSError:
            if _open(folder) is None:
                raise  # not a lost race: the folder is still not there, or still not whole
